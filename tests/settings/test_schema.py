"""Settings are checked against constructors, whose source code is read and not run."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args

import pytest

import walk
from options import check_part
from realera import setting_types
from realera.contracts import UserError
from realera.paths import CONF_DIR
from realera.settings import constructors, schema, source_code
from realera.settings.instantiate import build
from realera.settings.values import Anything, Look

SOURCE = """
from __future__ import annotations
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional, TypedDict
import torch
from realera.contracts import Editor, Sampler
from realera.setting_types import Count, Number, Share
raise RuntimeError("this module is read, never run")
Mood = Literal["good", "bad", 3]
MOST = 2**3

class Inner(TypedDict, total=False):
    share: Share

class Base:
    def __init__(self, name: str, share: Share = 0.5) -> None: ...

class Child(Base):
    def __init__(self, own: Annotated[float, Number(0, MOST, above=True)], **rest: Any) -> None:
        super().__init__("fixed", **rest)

class Heir(Child):
    pass

class Free:
    def __init__(self, **anything: Any) -> None: ...

class Unknown(torch.nn.Module):
    pass

@dataclass
class Fields:
    count: Count
    mood: Mood = "good"
    listed: Sequence[Count] = ()
    table: Mapping[Mood, float] = field(default_factory=dict)
    inner: Inner | None = None
    sampler: Sampler | None = None
    editor: Optional[Editor] = None
    flag: bool = False
    tensor: torch.Tensor | None = None
    untold = 5
    made: int = field(default=0, init=False)

def factory(share: Share) -> Fields: ...
"""

ODD_SOURCE = """
from __future__ import annotations
import contextlib, functools
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

def define(cls):  # as attrs.define
    def init(self, **fields: int) -> None: ...
    cls.__init__ = init
    return cls

class Mixin:
    def help(self) -> None: ...

class Base:
    def __init__(self, own: int) -> None:
        self.own = own

    @classmethod
    def made(cls, text: str) -> Base:
        return cls(len(text))

class Both(Mixin, Base): ...

class Root:
    def __init__(self, root: int = 0) -> None: ...

class Left(Root): ...

class Right(Root):
    def __init__(self, right: int) -> None: ...

class Diamond(Left, Right): ...

@define
class Attrs:
    x: int

class HeirOfAttrs(Attrs): ...

class New:
    def __new__(cls, x: int) -> New:
        return super().__new__(cls)

    def __init__(self, x: int) -> None: ...

class Meta(type):
    def __call__(cls, x: int) -> object:
        return super().__call__()

class OfMeta(metaclass=Meta): ...

@dataclass
class Own:
    a: int
    _: KW_ONLY
    b: int = 0

@dataclass
class OverOwn(Base):
    c: int

@dataclass
class WithInit:
    a: int = 0

    def __init__(self, z: int) -> None: ...

@dataclass(init=False)
class NoInit(Base):
    a: int = 0

class Row(NamedTuple):
    a: int

class HeirOfRow(Row): ...

def with_seven(function):
    @functools.wraps(function)
    def wrapped(x: int, seven: int = 7):
        return function(x)
    return wrapped

@with_seven
def decorated(x: int) -> Base:
    return Base(x)

class DecoratedInit:
    @with_seven
    def __init__(self, x: int) -> None: ...

with contextlib.suppress(ImportError) as suppressed:
    class UnderWith(Base): ...

for number in range(1):
    class UnderFor(Base): ...

try:
    pass
finally:
    class UnderFinally(Base): ...

One, (Two, Three) = Base, (Base, Base)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module, which fails if it is imported."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def check(mine: str, cls: str, **settings: Any) -> None:
    check_part({"_target_": f"{mine}.{cls}", **settings}, "part")


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("Both", {"own": 1}),
        ("Base.made", {"text": "abc"}),
        ("Diamond", {"right": 1}),
        ("Attrs", {"x": 1}),
        ("HeirOfAttrs", {"x": 1}),
        ("New", {"x": 1}),
        ("Own", {"a": 1, "b": 2}),
        ("OverOwn", {"c": 1}),
        ("WithInit", {"z": 1}),
        ("NoInit", {"own": 1}),
        ("Row", {"a": 1}),
        ("HeirOfRow", {"a": 1}),
        ("decorated", {"x": 1, "seven": 8}),
        ("UnderWith", {"own": 1}),
        ("UnderFor", {"own": 1}),
        ("UnderFinally", {"own": 1}),
        ("Two", {"own": 1}),
    ],
)
def test_settings_that_python_can_build_pass(
    target: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"odd_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(ODD_SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    node = {"_target_": f"{name}.{target}", **settings}
    check_part(node, "part")
    assert build(node) is not None


@pytest.mark.parametrize(
    ("target", "settings"),
    [("Both", {"x": 1}), ("Diamond", {"root": 1}), ("OverOwn", {"own": 1}), ("WithInit", {"a": 1}), ("Own", {"_": 1})],
)
def test_settings_that_python_cannot_build_are_refused(
    target: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"odd_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(ODD_SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="there is no setting"):
        check_part({"_target_": f"{name}.{target}", **settings}, "part")


SAMPLER = {"_target_": "realera.contracts.Sampler", "steps": 5}


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        ("Fields", {"count": 1}),
        ("Fields", {"count": 1, "mood": 3, "listed": [1, 2], "table": {"good": 1.5}, "flag": True}),
        ("Fields", {"count": 1, "inner": {"share": 1}, "sampler": SAMPLER, "tensor": "anything"}),
        ("Fields", {"_partial_": True}),
        ("Child", {"own": 8, "share": 0.1}),
        ("Heir", {"own": 8}),
        ("Free", {"whatever": [1]}),
        ("Unknown", {"whatever": [1]}),
        ("factory", {"share": 0}),
    ],
)
def test_valid_settings_pass(mine: str, cls: str, settings: dict[str, Any]) -> None:
    check(mine, cls, **settings)


@pytest.mark.parametrize(
    ("cls", "settings", "said"),
    [
        ("Fields", {}, "part.count is missing: give a whole number from 1 to 1000000"),
        ("Fields", {"count": True}, "part.count=true is not valid: give a whole number"),
        ("Fields", {"count": 1.0}, "part.count=1.0 is not valid"),
        ("Fields", {"count": "1"}, "part.count=1 is not valid"),
        ("Fields", {"count": 1, "mood": "goood"}, "goood is not valid; did you mean 'good'\\? give good, bad or 3"),
        ("Fields", {"count": 1, "listed": 3}, "part.listed=3 is not valid: give a list"),
        ("Fields", {"count": 1, "listed": [1, 0]}, r"part.listed\[1\]=0 is not valid"),
        ("Fields", {"count": 1, "table": {"god": 1}}, "no setting 'part.table.god'; did you mean 'part.table.good'"),
        ("Fields", {"count": 1, "table": {"good": math.nan}}, "part.table.good=nan is not valid: give a number"),
        ("Fields", {"count": 1, "inner": {"share": 2}}, "part.inner.share=2 is not valid: give a number from 0 to 1"),
        ("Fields", {"count": 1, "inner": {"shar": 1}}, "no setting 'part.inner.shar'; did you mean 'part.inner.share'"),
        ("Fields", {"count": 1, "inner": 7}, "part.inner=7 is not valid: give its settings.* or null"),
        ("Fields", {"count": 1, "sampler": {"steps": 3}}, "part.sampler has no _target_"),
        ("Fields", {"count": 1, "sampler": {**SAMPLER, "steps": 0}}, "part.sampler.steps=0 is not valid"),
        ("Fields", {"count": 1, "sampler": {"_target_": "MINE.Base", "name": "x"}}, "Base cannot be used as Sampler"),
        (
            "Fields",
            {"count": 1, "editor": SAMPLER},
            "Sampler cannot be used as Editor, because it has no method __call__",
        ),
        ("Fields", {"count": 1, "made": 3}, "no setting 'part.made'"),
        ("Fields", {"count": 1, "untold": 3}, "no setting 'part.untold'"),
        ("Fields", {"count": 1, "_convert_": "most"}, "part._convert_=most is not valid"),
        ("Field", {}, r"there is no Field in mine_\w+; check the spelling"),
        ("Child", {"own": 0}, "part.own=0 is not valid: give a number above 0, at most 8"),
        ("Child", {"own": 1, "name": "x"}, "no setting 'part.name'"),
        ("Heir", {"own": 1, "shar": 1}, "no setting 'part.shar'; did you mean 'part.share'"),
        ("factory", {"share": "all"}, "part.share=all is not valid"),
    ],
)
def test_settings_that_are_not_valid_are_refused(mine: str, cls: str, settings: dict[str, Any], said: str) -> None:
    for value in settings.values():
        if isinstance(value, dict) and "MINE" in str(value.get("_target_")):
            value["_target_"] = f"{mine}.Base"
    with pytest.raises(UserError, match=said):
        check(mine, cls, **settings)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (None, "_target_=null is not valid"),
        ("Thing", "Thing is not a dotted name"),
        ("no_such_package.Thing", "there is no module no_such_package"),
        ("realera.methods.nothing.Thing", "there is no module realera.methods.nothing"),
        ("realera.methods.uce.Nothing.made", "there is no module realera.methods.uce.Nothing"),
        ("realera.methods.uce.Nothing", "there is no Nothing in realera.methods.uce"),
        ("../x.Y", "is not valid: give the dotted name"),
    ],
)
def test_a_target_that_does_not_exist_is_refused(target: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_part({"_target_": target}, "part")


NO_DEVICES = [0, -2, True, 1.0, 1.5, "0", "two", "1,1", [], [0, 0], [-1], [0.0], None]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (setting_types.Number(), [0, -1.5, 1e300], [math.nan, math.inf, True, "1", None]),
        (setting_types.Number(1, 9, whole=True, infinite=True), [1, 9, 2.0, math.inf], [0, 1.5, math.nan, -math.inf]),
        (setting_types.Number(0, 1, above=True, below=True), [0.5], [0, 1]),
        (setting_types.Text(), ["", "a\nb", "é"], [None, 1, "a\0", "\udcff", "x" * 10**6]),
        (setting_types.Text(least=1, numbers=True), ["a", 5, 0.5], ["", " ", True, math.nan]),
        (setting_types.Text(template=True), ["a {}"], ["a", "{} {}"]),
        (setting_types.Pattern("ab?", "a"), ["a", "ab"], ["b", "", 1]),
        (setting_types.DeviceList(), [1, -1, "auto", "-1", "2", "0,1", "3,", [0, 3]], NO_DEVICES),
        (
            setting_types.PathText(),
            ["a/b", "./5", Path("x"), "~/x"],
            ["", " ", "a\0", "x" * 300, True, None, 1.5, 5, "~no one/x"],
        ),
        (setting_types.PathText(numbers=True), ["a/b", 2024], [0, True, 1.5]),
        (get_args(setting_types.FirstSeed)[1], [0, 2**62], [-1, 2**63 - 1]),
        (get_args(setting_types.TorchDevice)[1], ["auto", "cpu", "cuda:1"], ["mps", "cuda:x", "gpu"]),
        (
            setting_types.PathText("a file", "file", ("word",)),
            [__file__, "word"],
            ["nowhere", str(Path(__file__).parent)],
        ),
        (setting_types.PathText("a folder", "folder"), [str(Path(__file__).parent)], [__file__]),
        (setting_types.Program(), [sys.executable, "sh"], ["no-such-program", 1.5]),
    ],
)
def test_kinds(kind: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if kind.fault(value) is not None] == []
    assert [value for value in bad if kind.fault(value) is None] == []
    assert kind.words


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        ("judges.miniature.MiniatureJudge", "unsafe", [5]),
        ("judges.clip.ClipJudge", "labels", [5]),
        ("judges.clip.ClipJudge", "model", 5),
        ("judges.clip.ClipJudge", "pretrained", 5),
        ("methods.masks.Masks", "detector", 5),
        ("tasks.objects.ObjectTask", "data", 5),
        ("contracts.LoraSpec", "targets", [5]),
        ("contracts.Method", "name", 5),
    ],
)
def test_a_number_is_refused_if_its_reader_needs_a_text(target: str, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"part\.{name}.*=5 is not valid: give .*as a text it needs quotes"):
        check_part({"_target_": f"realera.{target}", "_partial_": True, name: value}, "part")


def test_a_number_is_accepted_if_its_reader_makes_a_text_of_it() -> None:
    with pytest.raises(
        UserError, match=r"x\.pretrained=5 is a number \(for a path of that name type \./5\): give a hub id"
    ):
        check_part({"_target_": "realera.backbones.unet.UNetBackbone", "_partial_": True, "pretrained": 5}, "x")
    check_part({"_target_": "realera.tasks.objects.ObjectTask", "_partial_": True, "synonyms": [747]}, "x")


def test_the_sentence_says_the_range() -> None:
    assert setting_types.Number(0, 1).words == "a number from 0 to 1"
    assert setting_types.Number(0, 10, above=True).words == "a number above 0, at most 10"
    assert setting_types.Number(1, whole=True, infinite=True).words == "a whole number from 1, or .inf"
    assert setting_types.Number().words == "a number"
    assert setting_types.Number(0, 2**63 - 1, whole=True).words.endswith("to 2^63 - 1")


@pytest.mark.quick(12)
@pytest.mark.parametrize(("group", "option"), walk.options(), ids=lambda value: str(value))
def test_every_parameter_of_every_class_in_a_yaml_has_a_kind(group: str, option: str) -> None:
    _, config, _ = walk.walked(group, option)
    unsaid = [f"{target}: {name}" for target in targets(config) for name in unchecked(target)]
    assert not unsaid


def test_every_setting_of_a_command_has_a_kind() -> None:
    for door in (*walk.DOORS, "search"):
        assert unchecked(f"{schema.SETTINGS}.{door.capitalize()}") in ([], ["sampler"])  # Optuna's own
        if door != "search":
            own = set(walk.own_yaml(CONF_DIR / f"{door}.yaml"))
            found = source_code.find(f"{schema.SETTINGS}.{door.capitalize()}")
            assert isinstance(found, source_code.Class)
            signature = constructors.signature(found)
            assert signature is not None and own <= set(signature.parameters), door


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("fast_dev_run", True, "use method.align.steps"),
        ("limit_train_batches", 0, "use method.align.steps"),
        ("max_steps", 3, "use method.align.steps"),
        ("max_time", "00:00:00:01", "use method.align.steps"),
        ("overfit_batches", 1, "use method.align.steps"),
        ("callbacks", [], "use the method's parts"),
        ("enable_progress_bar", True, "there is no setting 'trainer.enable_progress_bar'"),
        ("sync_batchnorm", True, "there is no setting 'trainer.sync_batchnorm'"),
        ("deterministic", "yes", "trainer.deterministic=yes is not valid"),
    ],
)
def test_a_trainer_takes_no_keyword_that_changes_the_result(name: str, value: Any, said: str) -> None:
    """A run's folder name does not depend on them, so the usual command would take such a run for its own."""
    _, config, _ = walk.walked("method", "esd-x")
    with pytest.raises(UserError, match=said):
        schema.check(walk.with_value(config, ("trainer", name), value), "train")
    for harmless in ("benchmark", "deterministic", "detect_anomaly"):
        schema.check(walk.with_value(config, ("trainer", harmless), True), "train")


def unchecked(target: str) -> list[str]:
    """The parameters of a class that are not checked."""
    found = source_code.find(target)
    assert isinstance(found, source_code.Class), target
    taken = constructors.signature(found)
    assert taken is not None and taken.others is None, target
    return [name for name, one in taken.parameters.items() if isinstance(schema.kind_of(one), Anything)]


def targets(node: Any) -> list[str]:
    if not isinstance(node, dict):
        return []
    own = [str(node["_target_"])] if str(node.get("_target_")).startswith("realera.") else []
    return [*own, *(target for value in node.values() for target in targets(value))]


def test_the_settings_of_a_run_are_checked_for_types_alone() -> None:
    _, config, _ = walk.walked("method", "mace")
    older = {**config, "version": 1, "method": {**config["method"]}}
    for key in ("blur", "label", "dry_run"):
        del older[key]
    older["judge"] = {"_target_": "realera.judges.miniature.MiniatureJudge", "weights": "/not/on/this/machine"}
    schema.check_stored(older)
    schema.check_stored({**older, "method": {"name": "original"}})
    for place, value in ((("method", "align", "lr"), "abc"), (("backbone", "sampler", "steps"), None), (("seed",), -1)):
        with pytest.raises(UserError, match=rf"{'.'.join(place)}="):
            schema.check_stored(walk.with_value(older, place, value))


def test_nothing_is_imported() -> None:
    """Checking a config that names thirty of our classes does not import torch."""
    code = """
        import sys
        from realera.settings import schema, walk_config
        for door, config in walk_config: schema.check(config, door)
        print([name for name in ("torch", "numpy", "lightning", "wandb", "realera.methods") if name in sys.modules])
    """
    config = [walk.walked("method", name)[:2] for name in ("mace", "sa")]
    source = textwrap.dedent(code).replace("import schema, walk_config", "import schema")
    done = subprocess.run(
        [sys.executable, "-c", f"walk_config = {config!r}\n{source}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_files_may_be_missing_in_a_check_for_another_machine() -> None:
    node = {"_target_": "realera.methods.priors.Preserved", "prior_cache": "nowhere", "scale": 1e-4}
    schema.Part().check(node, "x", Look(here=False))
    with pytest.raises(UserError, match="prior_cache=nowhere is not a file"):
        check_part(node, "x")
