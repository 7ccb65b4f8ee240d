"""Threads of ours: what they leave of PyTorch's settings, and that they end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

import torch_rsst
from torch_rsst.selection import topk
from torch_rsst.utils import threads
from torch_rsst.utils.threads import Workers, one_thread


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.usefixtures("three_threads")
def test_calls_at_the_same_time_leave_the_number_of_threads() -> None:
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    found = []

    def first() -> None:
        with one_thread():
            first_in.set()
            second_in.wait()
        found.append(torch.get_num_threads())
        first_out.set()

    def second() -> None:
        first_in.wait()
        with one_thread():
            second_in.set()
            first_out.wait()
            assert torch.get_num_threads() == 1
        found.append(torch.get_num_threads())

    both = [threading.Thread(target=work) for work in (first, second)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    in_a_thread(lambda: found.append(torch.get_num_threads()))
    assert found == [3, 3, 3]


@pytest.mark.usefixtures("three_threads")
def test_a_call_within_a_call_stays_in_one_thread() -> None:
    with one_thread():
        with one_thread():
            pass
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_masks_that_require_gradients_are_written_by_several_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(topk, "_BLOCK", 8)
    monkeypatch.setattr(threads, "_ENTRIES_EACH", 2)
    layer = torch.nn.Linear(8, 8)
    torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=10)
    layer.weight_mask.requires_grad_()
    torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=10)
    assert int((layer.weight_mask == 0).sum()) == 20


@pytest.mark.parametrize("interrupts", [1, 3])
def test_an_interrupt_waits_for_all_threads(
    interrupts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, finished, left = threading.Event(), threading.Event(), iter(range(interrupts - 1))
    wait = threading.Event.wait

    def interrupted(event: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is main and timeout is None:
            for _ in left:
                raise KeyboardInterrupt
        return wait(event, timeout)

    def work(worker: int, workers: int) -> None:
        if worker:
            begun.set()
            wait(threading.Event(), 0.2)
            finished.set()
        else:
            wait(begun, 5.0)
            monkeypatch.setattr(threading.Event, "wait", interrupted)
            raise KeyboardInterrupt

    monkeypatch.setattr(threads, "_ENTRIES_EACH", 1)
    main = threading.current_thread()
    two = SimpleNamespace(
        get_num_threads=lambda: 2, set_num_threads=lambda _: None, no_grad=torch.no_grad
    )
    monkeypatch.setattr(threads, "torch", two)
    with pytest.raises(KeyboardInterrupt):
        Workers(2).run(work)
    assert finished.is_set()


@pytest.mark.usefixtures("three_threads")
def test_nothing_is_written_once_a_run_has_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, written = threading.Event(), []

    def work(worker: int, workers: int) -> None:
        if worker == 0:
            begun.wait()
            raise KeyboardInterrupt
        begun.set()
        threading.Event().wait(0.2)
        written.append(worker)

    interrupts = iter([KeyboardInterrupt(), KeyboardInterrupt()])
    stop = threading.Event.set

    def interrupted(event: threading.Event) -> None:
        if threading.get_ident() == main and begun.is_set():
            for interrupt in interrupts:
                raise interrupt
        stop(event)

    monkeypatch.setattr(threads, "_ENTRIES_EACH", 1)
    main = threading.get_ident()
    monkeypatch.setattr(threading.Event, "set", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Workers(2).run(work)
    assert written == [1]
