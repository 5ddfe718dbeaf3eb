"""Sums the captions that a closed form must preserve: python -m realera.cache captions=FILE"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from realera import cli, console, paths
from realera.contracts import UserError
from realera.runs import preflight, prompt_lengths
from realera.settings import composition
from realera.settings.run_settings import Settings
from realera.system import disk, locks
from realera.tasks import captions
from realera.tasks.prompts import slug


def cache(cfg: DictConfig) -> None:
    config = composition.plain(cfg)
    given = config["captions"]
    files = [Path(str(file)).expanduser() for file in (given if isinstance(given, list) else [given])]
    column = config["column"]
    model = Settings(config).backbone
    preflight.check_model(model)
    counted = prompt_lengths.Lengths(model)
    for text in captions.captions_in(files, column):
        counted.add(text)
    if not (total := counted.texts):
        raise UserError(f"captions={', '.join(map(str, files))} contains no caption: give another file.")

    from realera.methods import priors
    from realera.runs import steps  # torch and diffusers: slow, so imported after all checks but that of out=

    source = priors.content_id(files, str(column))
    name = f"{slug(files[0].stem)}-{model.name}-{source[:8]}.safetensors"
    out = Path(str(config["out"])).expanduser() if config["out"] else paths.cache_dir() / "captions" / name
    preflight.check_writable(out.parent, "out")
    cli.say_backbone(config)
    if said := counted.said("captions"):
        cli.log.warning("%s", said)
    backbone = steps.load_backbone(config)
    with console.bar(f"captions of {files[0].name}", total, rate="captions/s") as advance, locks.exclusive(out):
        if config["overwrite"]:
            for old in (out, priors.partial(out)):
                with disk.explained(old):
                    old.unlink(missing_ok=True)
        priors.accumulate(backbone, captions.captions_in(files, column), out, source, advance=advance)
    console.show_path(f"sum of {total:,} captions, for method.edit.preserved.prior_cache=FILE", out)


def main() -> None:
    cli.run_command("cache", cache)


if __name__ == "__main__":
    cli.as_process(main)
