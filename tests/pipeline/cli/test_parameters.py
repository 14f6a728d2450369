"""pipeline.cli.parameters: parameters in errors of the library become flags of the command."""

from __future__ import annotations

import pytest

from pipeline.cli.main import run_command
from pipeline.cli.parameters import with_flags
from pipeline.cli.parser import Parser
from pipeline.errors import UserError


def test_parameters_are_printed_as_flags_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        parser = Parser(prog="command")
        parser.group("data").add_argument("--image_size")
        parser.parse_strictly(argv)
        raise UserError("`image_size`=9: `no_such_flag` and `image_size` with spaces in `a command`")

    with pytest.raises(SystemExit):
        run_command(main, ["--image_size=9"])
    assert capsys.readouterr().err == (
        "error: --image_size=9: `no_such_flag` and --image_size with spaces in `a command`\n"
    )


def test_text_without_parameters_stays() -> None:
    assert with_flags("--image_size=9, image_size, ``, `image_size=3`") == (
        "--image_size=9, image_size, ``, `image_size=3`"
    )
