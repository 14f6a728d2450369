"""pipeline.errors.causes: errors found below Beam and TensorFlow."""

from __future__ import annotations

import errno
import shutil
import traceback
from pathlib import Path

import apache_beam as beam
import pytest
import tensorflow as tf
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli.main import run_command
from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.errors.causes import find_error, find_reason, system_error
from tests.small_disk import small_disk

MESSAGE = "view 7 (example 3): crop fingerprint is 00c0ffee here, 0badf00d in the store [1 of 4]; stop"


@pytest.mark.parametrize("kind", [UserError, TryAgainError, DataError])
def test_an_error_is_found_directly_and_below_others(kind: type[Exception]) -> None:
    original = kind(MESSAGE)
    caused = RuntimeError("outer")
    caused.__cause__ = original
    handled = ValueError("outermost")
    handled.__context__ = caused
    text = RuntimeError(f"Unknown: pipeline.errors.{kind.__name__}: {MESSAGE}\nTraceback ...")
    for error in (original, caused, handled, text):
        found = find_error(error)
        assert type(found) is kind
        assert str(found) == MESSAGE


def test_another_error_is_not_taken_for_one() -> None:
    assert find_error(ValueError("DataError is what this is not")) is None
    loop = ValueError("a")
    loop.__context__ = RuntimeError("b")
    loop.__context__.__context__ = loop
    assert find_error(loop) is None


def run_beam(flags: list[str]) -> None:
    def fail(number: int, message: str = MESSAGE) -> int:
        from pipeline.errors import DataError

        raise DataError(message)

    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner", *flags])) as pipeline:
        _ = pipeline | beam.Create([1]) | "ComputeShard" >> beam.Map(fail)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="in_process"),
        pytest.param(
            ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
            id="multi_processing",
            marks=pytest.mark.slow,  # Beam's own worker processes: once in some hundred runs one never answers
        ),
    ],
)
def test_an_error_is_found_in_that_of_beam(flags: list[str]) -> None:
    """Between processes, only the traceback of an exception remains, as text."""
    with pytest.raises(Exception, match="view 7") as caught:
        run_beam(flags)
    found = find_error(caught.value)
    assert isinstance(found, DataError)
    assert str(found) == MESSAGE


def test_an_error_is_found_in_that_of_tf_data() -> None:
    def fail(number: int) -> int:
        raise DataError(MESSAGE)

    dataset = tf.data.Dataset.range(1).map(lambda i: tf.numpy_function(fail, [i], tf.int64))
    with pytest.raises(tf.errors.OpError) as caught:
        next(iter(dataset))
    found = find_error(caught.value)
    assert isinstance(found, DataError)
    assert str(found) == MESSAGE


FULL = "No space left on device; "


def test_a_full_disk_is_found_in_errors_of_python_and_tensorflow(tmp_path: Path) -> None:
    variable = tf.Variable(tf.random.stateless_normal([700_000], [0, 0]))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "large").write_bytes(bytes(2 << 20))

    def save() -> None:
        tf.train.Checkpoint(variable=variable).write(str(tmp_path / "disk" / "saved"))

    def copy() -> None:
        shutil.copytree(tmp_path / "a", tmp_path / "disk" / "a")

    def write() -> None:
        (tmp_path / "disk" / "saved").write_bytes(bytes(2 << 20))

    with small_disk(tmp_path / "disk", size=1 << 20) as disk:
        for act, path in ((save, "saved"), (copy, "a/large"), (write, "")):
            with pytest.raises(Exception) as caught:  # noqa: PT011
                act()
            found = system_error(caught.value)
            assert FULL in str(found)
            assert str(found).startswith(f"{disk}/{path}" if path else FULL)
            for left in disk.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the disk is not full"),
        RuntimeError("step 3; No space"),
        tf.errors.NotFoundError(None, None, "a; No such file or directory"),
    ],
)
def test_other_errors_are_not_system_errors(error: Exception) -> None:
    assert system_error(error) is None


def run_as(module: str, code: str) -> Exception:
    """The exception that code of a module raises."""
    path = f"/packages/{module.replace('.', '/')}.py"
    names = {"__name__": module, "UserError": UserError, "MESSAGE": MESSAGE}
    with pytest.raises(Exception) as caught:  # noqa: PT011
        exec(compile(code, path, "exec"), names)
    return caught.value


HANDLES_A_MISTAKE = """
try:
    raise UserError(MESSAGE)
except UserError:
    {}["a"]
"""
HANDLES_A_REFUSAL = """
try:
    raise PermissionError(13, "Permission denied", "a")
except PermissionError:
    [].pop()
"""
HIDES_A_MISTAKE = """
try:
    raise UserError(MESSAGE)
except UserError:
    raise ValueError("a defect") from None
"""


@pytest.mark.parametrize("code", [HANDLES_A_MISTAKE, HANDLES_A_REFUSAL, HIDES_A_MISTAKE])
def test_a_defect_met_while_a_mistake_is_handled_stays_a_defect(code: str) -> None:
    error = run_as("pipeline.precomputing.worker", code)
    assert find_reason(error) is None
    # As a worker process of Beam passes it on.
    assert find_reason(RuntimeError("".join(traceback.format_exception(error)))) is None
    with pytest.raises(type(error)):
        run_command(lambda argv: run_as_main(error), [])


def run_as_main(error: Exception) -> None:
    raise error


def test_a_mistake_is_found_in_the_error_of_a_library() -> None:
    code = HANDLES_A_MISTAKE.replace('{}["a"]', 'raise RuntimeError("long words")')
    error = run_as("apache_beam.runners.common", code)
    assert isinstance(find_reason(error), UserError)
    assert isinstance(find_reason(RuntimeError("".join(traceback.format_exception(error)))), UserError)


def test_a_mistake_is_found_in_a_wrapper_with_its_traceback() -> None:
    """As Beam creates them: the last line of its traceback is one of ours."""
    mistake = run_as("pipeline.precomputing.worker", "raise UserError(MESSAGE)")
    wrapper = RuntimeError("long words").with_traceback(mistake.__traceback__)
    wrapper.__context__ = mistake
    assert find_reason(wrapper) is mistake
    assert isinstance(find_reason(RuntimeError("".join(traceback.format_exception(wrapper)))), UserError)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a"),
        FileExistsError(errno.EEXIST, "File exists", "a"),
        IsADirectoryError(errno.EISDIR, "Is a directory", "a"),
        OSError(errno.EINVAL, "Invalid argument"),
        PermissionError(errno.EPERM, "Operation not permitted"),  # of a signal or a socket, not of a file
        KeyError("a; No space left on device"),
        AssertionError("[Errno 13] Permission denied: 'a'"),
    ],
)
def test_a_defect_that_looks_like_a_system_error_keeps_its_traceback(error: Exception) -> None:
    assert find_reason(error) is None
