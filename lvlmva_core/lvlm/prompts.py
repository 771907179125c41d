"""Prompts from files: one folder per data set with specification.yaml, and critic.j2 and judge.j2.

A template that a folder lacks is the one of the folder `generic` beside it, so that a new data set needs no more than
its specification.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lvlmva_core.errors import InputError

CRITIC_FILES = ("critic.j2", "specification.yaml")
JUDGE_FILES = ("judge.j2",)
SHARED = "generic"  # the folder whose templates stand in for those that another lacks


def _said(text: str) -> str:
    if text in ("~", "null"):  # all of a specification is read as text
        raise ValueError("nothing is said here; write a description")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_said)]


class Specification(BaseModel):
    """What an expert says about a task, in words.

    picture: what the pictures are. classes: class name -> what shows the class. spurious_features: what is known to
    co-occur with a class without belonging to it; may be empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    picture: Text
    classes: dict[str, Text]
    spurious_features: list[Text]


@dataclass(frozen=True)
class Prompts:
    """A folder of prompts, read and checked. digest: sha256 over the files that were read."""

    file: Path
    template: Any
    specification: Specification | None
    digest: str

    def render(self, **values: Any) -> str:
        """Fill the template.

        Raises:
            InputError: it uses a name that does not exist, or reaches for what the sandbox forbids.
        """
        from jinja2 import TemplateError

        try:
            return str(self.template.render(values))
        except TemplateError as error:  # undefined names, and what the sandbox refuses
            names = ", ".join(sorted(values))
            raise InputError(f"{self.file}: {error.message}; names that exist: {names}") from error
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InputError(f"{self.file}: cannot be filled ({error}); mend the template") from error


def load_critic_prompts(folder: Path, class_names: list[str]) -> Prompts:
    """Read critic.j2 and specification.yaml, and check that every class is described.

    Raises:
        InputError: a file is missing or malformed, or a class has no description.
    """
    specification = read_specification(folder / "specification.yaml")
    missing = [name for name in class_names if name not in specification.classes]
    if missing:
        raise InputError(
            f"{folder / 'specification.yaml'}: no description for the class '{missing[0]}'; add it under 'classes'"
        )
    return _prompts(template_of(folder, "critic.j2"), specification, prompts_digest(folder, *CRITIC_FILES))


def load_judge_prompts(folder: Path) -> Prompts:
    """Read judge.j2. Raises InputError where it is missing."""
    return _prompts(template_of(folder, "judge.j2"), None, prompts_digest(folder, *JUDGE_FILES))


def load_proposal_prompts(folder: Path) -> Prompts:
    """Read proposal.j2, which asks for a better specification (an extension). Raises InputError where it is missing."""
    return _prompts(template_of(folder, "proposal.j2"), None, prompts_digest(folder, "proposal.j2"))


def template_of(folder: Path, name: str) -> Path:
    """The file of a template: the folder's own, else that of the folder `generic` beside it."""
    shared = folder.parent / SHARED / name
    return folder / name if (folder / name).exists() or not shared.exists() else shared


def _prompts(file: Path, specification: Specification | None, digest: str) -> Prompts:
    """Compile a template in a sandbox: a prompt file from elsewhere must not reach Python's objects."""
    from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    try:
        return Prompts(file, environment.from_string(_read(file)), specification, digest)
    except TemplateSyntaxError as error:
        raise InputError(f"{file}, line {error.lineno}: {error.message}; mend the template") from error
    except TemplateError as error:
        raise InputError(f"{file}: {error.message}; mend the template") from error


def read_specification(file: Path) -> Specification:
    """Read specification.yaml. Raises InputError where it is missing or malformed."""
    return parse_specification(_read(file), file)


def parse_specification(text: str, file: Path) -> Specification:
    """What the text of a specification.yaml says. file: for messages. Raises InputError where it is malformed."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        # "base": every value is the text that stands there, so that classes may be named no, on, 1.0 or null
        return Specification.model_validate(YAML(typ="base", pure=True).load(text))
    except YAMLError as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        problem = first["msg"].removeprefix("Value error, ")
        problem = problem[0].lower() + problem[1:]
        raise InputError(f"{file}: '{where}': {problem}; see prompts/generic for the form") from None


def prompts_digest(folder: Path, *names: str) -> str:
    """sha256 over the files that a folder of prompts stands for. Raises InputError where one is missing."""
    files = [template_of(folder, name) if name.endswith(".j2") else folder / name for name in names]
    return hashlib.sha256(b"".join(_read(file).encode() + b"\0" for file in files)).hexdigest()


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); see prompts/generic for the files of a folder") from error
