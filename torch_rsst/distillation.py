"""Knowledge distillation: a loss that also asks for the outputs of a teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from torch_rsst.utils.amounts import check_fraction, check_number
from torch_rsst.utils.errors import refuse


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    loss: Tensor,
    *,
    weight: float = 0.5,
    temperature: float = 2.0,
) -> Tensor:
    """The weighted mean of a task's loss and of the distance to a teacher's predictions.

    Example:
        >>> images, labels = torch.randn(8, 4), torch.randint(3, (8,))
        >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> with torch.no_grad():
        ...     wanted = teacher(images)
        >>> logits = student(images)
        >>> loss = torch.nn.functional.cross_entropy(logits, labels)
        >>> torch_rsst.distillation_loss(logits, wanted, loss).backward()

    The result is (1 − w) · loss + w · T² · KL(softmax(teacher / T) ‖ softmax(student / T)).

    The divergence is averaged over all positions: all dimensions but the last. The gradients of soft
    targets shrink with 1 / T², which the factor T² makes up for. The formula is that of Hinton, Vinyals and
    Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531); their cross-entropy with
    soft targets differs from the divergence by a constant.

    A good teacher for a pruned model is the model before pruning: ``copy.deepcopy(model).eval()``.

    Args:
        student: logits of the model that is trained, of shape (…, classes); −∞ for a class that is ruled out, in both.
        teacher: logits of the teacher, of the same shape; no gradient flows into them.
        loss: of the task, one number.
        weight: w, from 0 (the task alone) to 1 (the teacher alone).
        temperature: T, above 0; higher ones give more weight to the classes that are unlikely.

    Returns:
        one number; in float32 where the logits are of 16 bits.

    Raises:
        TypeError: for logits or a loss that are no floating-point tensors.
        ValueError: for shapes that differ, a loss of several numbers, or arguments out of range.
    """
    check_fraction(weight, "weight")
    check_number(temperature, "temperature", above=0)
    remedy = "Pass what the model puts out before the softmax, such as output.logits."
    _check_floating(student, "student", remedy)
    _check_floating(teacher, "teacher", remedy)
    _check_floating(loss, "loss", "Pass the loss itself, not loss.item().")
    if student.shape != teacher.shape or student.ndim == 0:
        expected, got = f"logits of shape {tuple(student.shape)}", f"shape {tuple(teacher.shape)}"
        remedy = "Run teacher and student on the same batch; logits end with the classes."
        refuse(ValueError, "teacher", expected, got, remedy)
    if loss.numel() != 1:
        got, remedy = f"shape {tuple(loss.shape)}", "Pass loss.mean()."
        refuse(ValueError, "loss", "one number", got, remedy)
    log_student = _log_softmax(student, temperature)
    log_teacher = _log_softmax(teacher.detach(), temperature)
    distances = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    # A class that the teacher rules out adds nothing, as 0 · log 0 = 0.
    distance = distances.masked_fill(log_teacher.isneginf(), 0.0).sum(-1).mean()
    return (1.0 - weight) * loss + weight * temperature**2 * distance


def _check_floating(given: object, name: str, remedy: str) -> None:
    if not isinstance(given, Tensor) or not given.is_floating_point():
        got = str(given.dtype) if isinstance(given, Tensor) else type(given).__name__
        refuse(TypeError, name, "a tensor of floating-point numbers", got, remedy)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    narrow = logits.dtype in (torch.float16, torch.bfloat16)
    return F.log_softmax((logits.float() if narrow else logits) / temperature, dim=-1)
