"""EnvPool's answers written down and actions sent in C++, against NumPy doing the same."""

import sys

import numpy as np
import pytest

from pyppo.contract import finite_ends
from pyppo.ops import PoolReader, PoolSender

T, N = 5, 3
DTYPES = ["bool", "uint8", "int32", "int64", "float32", "float64"]


class Written:
    """A column that is no array: it keeps what is written to it."""

    def __init__(self):
        self.rows = {}

    def __setitem__(self, t, x):
        self.rows[t] = x.copy()


def ends(x, state):
    return finite_ends(x, state[1] > state[2])


def answer(rng, dtype, done=False, shape=(4,)):
    """Rewards, done, truncated, observations."""
    obs = (rng.normal(size=(N, *shape)) * 50).astype(dtype)
    return [rng.normal(size=N).astype(np.float32), np.array([done, False, done]), np.array([False, False, done]), obs]


def columns(dtype, rows, shape=(4,)):
    """Of a rollout twice as wide as the group."""
    whole = [np.zeros((T, 2 * N), t) for t in ("float32", "bool", "bool")] + [np.zeros((T + 1, 2 * N, *shape), dtype)]
    return whole, [x[:, rows] for x in whole]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 3)])
def test_an_answer_is_written_as_numpy_writes_it(dtype, column_dtype, shape):
    rng, rows = np.random.default_rng(1), slice(N, 2 * N)
    (whole, own), (expected, other) = columns(column_dtype, rows, shape), columns(column_dtype, rows, shape)
    answers = [answer(rng, dtype, done=t == 2, shape=shape) for t in range(T)]
    asked = iter(answers)
    reader = PoolReader(lambda: next(asked), list(zip(own[:3], range(3), strict=True)), [(own[3], 3)], 1, ends)
    with np.errstate(invalid="ignore"):  # negative numbers as uint8
        for t, state in enumerate(answers):
            assert reader.read(t) is state
            for column, x in zip(other[:3], state, strict=False):
                column[t] = x
            other[3][t + 1] = state[3]
    for x, y in zip(whole, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    assert not any(x[:, :N].any() for x in whole)  # another group's rows


def test_broken_ends_columns_of_other_kinds_and_arrays_in_strides():
    rng = np.random.default_rng(2)
    state = answer(rng, "float64", done=True)
    state[3][0] = np.nan  # terminated; row 2 was cut off
    state[3] = np.asfortranarray(state[3])
    state[1] = np.repeat(state[1], 2)[::2]
    column, strided = Written(), np.zeros((T + 1, 4, N), np.float32).transpose(0, 2, 1)
    flags = [(Written(), i) for i in range(3)]
    reader = PoolReader(lambda: tuple(state), flags, [(column, 3), (strided, 3)], 1, ends)
    reader.read(0)
    for (written, _), x in zip(flags, state, strict=False):
        np.testing.assert_array_equal(written.rows[0], x)
    expected = np.where(np.isnan(state[3]), 0, state[3])
    np.testing.assert_array_equal(column.rows[1], expected)
    np.testing.assert_array_equal(strided[1], expected.astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "column_dtype"), [("O", "O"), ("U9", "U3"), (">f4", "<f4"), ("<f4", ">f4"), ("V0", "V0")]
)
def test_what_is_no_plain_number_is_written_by_numpy(dtype, column_dtype):
    """Bytes copied as they are would be other numbers, run past a row, or be objects that nobody keeps."""
    column, expected = np.zeros((T + 1, N), column_dtype), np.zeros(N, column_dtype)
    kept = [f"{i} of this test" for i in range(N)] if dtype == "O" else np.arange(1000, 1000 + N)
    expected[...] = np.array(kept).astype(dtype)
    x = np.array(kept).astype(dtype)
    counts = [sys.getrefcount(one) for one in x] if dtype == "O" else []
    PoolReader(lambda: [x, np.zeros(N, bool)], [], [(column, 0)], 1, ends).read(0)
    np.testing.assert_array_equal(column[1], expected)
    if dtype == "O":
        assert [sys.getrefcount(one) for one in x] == [count + 1 for count in counts]


def test_what_cannot_be_written_is_an_error():
    rng = np.random.default_rng(3)
    _, own = columns("float32", slice(0, N))
    state = answer(rng, "float32")

    def reader(answer_, flags=((0, 0),), observations=((3, 3),), done=1):
        places = [[(own[column], i) for column, i in group] for group in (flags, observations)]
        return PoolReader(lambda: answer_, *places, done, ends)

    for t in (-1, T, 10**9):
        with pytest.raises(IndexError, match="step"):
            reader(state).read(t)
    with pytest.raises(IndexError, match="shorter"):
        reader(state[:3]).read(0)
    with pytest.raises(IndexError, match="shorter"):
        reader(state, done=4).read(0)
    with pytest.raises(ValueError, match="broadcast"):
        reader([*state[:3], state[3][:2]]).read(0)
    with pytest.raises(TypeError, match="sequence"):
        reader(None).read(0)
    with pytest.raises(ZeroDivisionError):
        PoolReader(lambda: 1 / 0, [], [], 0, ends).read(0)


# --- actions ----------------------------------------------------------------------------------------------------------


def sender(dtype, low, high, shape=(N, 2)):
    sent = []
    buffer = np.zeros(shape, dtype)
    message = ["ids", buffer]

    def send(given):
        assert given is message
        sent.append(buffer.copy())

    return PoolSender(send, message, buffer, np.array(low, float), np.array(high, float)), sent


@pytest.mark.parametrize("one_core", [False, True])
@pytest.mark.parametrize(
    ("dtype", "buffer_dtype", "taken"),
    [
        ("float32", "float32", True),
        ("float64", "float32", True),
        ("float32", "float64", True),
        ("float64", "float64", True),
        ("int32", "int32", True),
        ("int64", "int32", True),
        ("int64", "int64", True),
        ("int32", "int64", True),
        ("int64", "float32", False),
        ("float32", "int32", False),
        ("int8", "int32", False),
        ("bool", "int32", False),
    ],
)
def test_actions_are_sent_converted_or_refused(dtype, buffer_dtype, taken, one_core):
    one, sent = sender(buffer_dtype, [-1, 0], [1, 3])
    actions = np.array([[0, 0], [1, 3], [0, 1]]).astype(dtype)
    assert one.send(actions, one_core) is taken
    assert len(sent) == taken
    if taken:
        np.testing.assert_array_equal(sent[0], actions.astype(buffer_dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
def test_only_actions_inside_the_bounds_are_sent(dtype):
    one, sent = sender(dtype, [-1, 0], [1, 3])
    good = np.array([[-1, 0], [1, 3], [0, 2]], dtype)
    wrong = [(0, 0, -2), (1, 0, 2), (2, 1, -1), (2, 1, 4)]
    if dtype.startswith("float"):
        wrong += [(1, 1, np.nan), (0, 1, np.inf), (2, 0, -np.inf), (2, 0, np.nextafter(np.array(1, dtype), 2))]
    for row, component, value in wrong:
        actions = good.copy()
        actions[row, component] = value
        assert one.send(actions, False) is False
    assert one.send(good, False) is True
    assert len(sent) == 1
    np.testing.assert_array_equal(sent[0], good)


def test_other_shapes_and_objects_are_not_sent():
    one, sent = sender("float32", [-1, -1], [1, 1])
    good = np.zeros((N, 2), np.float32)
    refused = [good[:2], good[:, :1], good.ravel(), good[None], np.zeros((2, N), np.float32).T, good.tolist(), None]
    refused += [good.astype(">f4"), good.astype(object)]
    assert [one.send(x, False) for x in refused] == [False] * len(refused)
    assert not sent
    with pytest.raises(ValueError, match="one bound for each"):
        sender("float32", [-1], [1])
    with pytest.raises(ValueError, match="contiguous"):
        PoolSender(print, [], np.zeros((4, 4))[:, ::2], np.zeros(2), np.ones(2))
