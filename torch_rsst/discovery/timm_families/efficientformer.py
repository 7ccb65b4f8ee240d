"""EfficientFormer, its second version, and TinyViT: values wider than keys, positions per head."""

from __future__ import annotations

from timm.models import efficientformer, efficientformer_v2, tiny_vit

from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, normed, produces


class EfficientFormerAttention(HeadAdapter):
    """``Attention`` of ``timm.models.efficientformer`` and of ``timm.models.tiny_vit``.

    Query, key and value of one head lie side by side.
    """

    classes = (efficientformer.Attention, tiny_vit.Attention)
    parts = (*produces("qkv"), Part("attention_biases"), *consumes())
    scaled = ("key_attn_dim", "val_attn_dim", "out_dim")


class EfficientFormerV2Attention(HeadAdapter):
    """``Attention2d`` and ``Attention2dDownsample`` of ``timm.models.efficientformer_v2``.

    They run with any number of heads but none. Heads that talk to each other are also heard by way of
    the others' maps.
    """

    classes = (efficientformer_v2.Attention2d, efficientformer_v2.Attention2dDownsample)
    parts = (
        *(
            part
            for name in ("q", "q.proj", "k", "v", "v_local")
            for part in (*produces(f"{name}.conv"), *normed(f"{name}.bn"))
        ),
        *(
            part
            for name in ("talking_head1", "talking_head2")
            for part in (*produces(name), *consumes(name))
        ),
        Part("attention_biases"),
        *consumes("proj.conv"),
    )
    scaled = ("dh",)
    least = 1
