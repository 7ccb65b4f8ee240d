"""The attributes in which attention modules keep the numbers of their heads.

One list for everything: they are read to find the heads of a module, and set when heads are cut. Add a name here
to support code that calls its attribute otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from torch_rsst.groups.surgery import Removal

HEADS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "nhead",
    "heads",
    "n_local_heads",
)
"""The number of heads; of query heads, where keys and values have fewer."""
KEY_VALUE_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "n_kv_head",
    "kv_heads",
    "n_local_kv_heads",
)
"""The number of key/value heads, each of which several query heads share."""
TOTAL_WIDTHS = ("all_head_size", "attn_dim", "inner_dim", "kv_dim", "split_size")
"""The width of all heads together."""
HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_head")
"""The width of one head, which stays when others are cut."""
CUT = (*HEADS, *KEY_VALUE_HEADS, *TOTAL_WIDTHS)
"""What becomes smaller in proportion when heads are cut."""


def head_count(module: nn.Module) -> int | None:
    """How many heads can be cut from a module; None for one that has none of the attributes.

    These are its key/value heads, where it has such an attribute: each goes with its query heads.

    >>> attention = nn.Module()
    >>> attention.n_head, attention.n_kv_head = 8, 2
    >>> head_count(attention)
    2
    """
    return _first_int(module, (*KEY_VALUE_HEADS, *HEADS))


def head_width(module: nn.Module) -> int:
    """The width of one head; 0 for a module that has none of the attributes."""
    return _first_int(module, HEAD_WIDTHS) or 0


def is_attention(module: nn.Module) -> bool:
    """Whether a module has one of the attributes of an attention."""
    return head_count(module) is not None or _first_int(module, HEAD_WIDTHS) is not None


def reduce_head_attributes(module: nn.Module, removal: Removal, more: Iterable[str] = ()) -> int:
    """Set the attributes of a module to what is left without the heads that were cut.

    Args:
        module: whose attributes are set.
        removal: what was cut.
        more: further attributes that become smaller in proportion, such as ``"dim_out"``; those of a
            child with its path, such as ``"attn.dim_out"``.

    Returns:
        the number of heads that are left.
    """
    before = removal.layer.units
    left = before - removal.count
    for name in dict.fromkeys((*CUT, *more)):
        path, _, attribute = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue  # an optional part that this module lacks
        value = vars(owner).get(attribute)
        if isinstance(value, int) and value % before == 0:
            setattr(owner, attribute, value // before * left)
    return left


def _first_int(module: nn.Module, names: Iterable[str]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)
