"""The tree of exceptions is what its docstring shows, and what its texts say."""

import copy
import inspect
import pickle

import pytest

from vfio_vmbus import errors
from vfio_vmbus.errors import IsolationFault, LocalError, PeerError, RefusedError, UsageError, VfioVmbusError, WaitTimeout


def shown() -> list[tuple[str, str]]:
    """(parent, child) of every line of the tree in the docstring."""
    pairs, above = [], {0: "VfioVmbusError"}
    for line in (errors.__doc__ or "").splitlines():
        if "+- " in line:
            depth = line.index("+- ") // 3
            above[depth] = line.partition("+- ")[2].split()[0]
            parent = max(level for level in above if level < depth)
            above = {level: name for level, name in above.items() if level <= depth}
            pairs.append((above[parent], above[depth]))
    return pairs


def test_the_docstring_shows_the_tree():
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not VfioVmbusError]
    tree = {(kind.__bases__[0].__name__, kind.__name__) for kind in classes}
    assert set(shown()) == tree


def test_nothing_is_both_the_callers_and_the_peers_mistake():
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        assert not (issubclass(kind, LocalError) and issubclass(kind, PeerError))


def test_mistakes_that_python_has_a_name_for_have_it():
    assert issubclass(UsageError, ValueError)
    assert issubclass(WaitTimeout, TimeoutError)


ERRORS = [
    (IsolationFault("nic1", 0x1000, 60, "read", "not mapped"), "nic1: read of 60 bytes at IOVA 0x1000: not mapped"),
    (WaitTimeout("the answer to Init", 2.5), "waited 2.5 s for the answer to Init"),
    (RefusedError("the host refused the buffer", 2), "the host refused the buffer (status 0x2)"),
    (RefusedError("the host refused the buffer"), "the host refused the buffer"),
]


@pytest.mark.parametrize(("error", "text"), ERRORS)
def test_texts_name_value_and_unit_and_survive_a_process_border(error, text):
    for one in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert str(one) == text
        assert vars(one) == vars(error)
