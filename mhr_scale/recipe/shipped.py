"""Files that come with the package: recipes and DeepSpeed files, by the same names everywhere.

A checkout has them in `launch/recipes` and `ds_configs`; a wheel carries both folders along, in
`mhr_scale/shipped`.
"""

from pathlib import Path

from mhr_scale.errors import ConfigError, did_you_mean

PACKAGE = Path(__file__).resolve().parents[1]
CARRIED = PACKAGE / "shipped"
#: What holds `launch/recipes` and `ds_configs`.
HOME = CARRIED if CARRIED.is_dir() else PACKAGE.parent
RECIPES = HOME / "launch" / "recipes"
DS_CONFIGS = HOME / "ds_configs"


def candidates(name: str, folder: Path, ending: str) -> list[Path]:
    """Where a file of this name may lie, in the order in which it is looked for.

    In the current folder; at home under its path in a checkout; in `folder`, with or without its
    `ending`.
    """
    return [Path(name), HOME / name, folder / name, folder / f"{name}{ending}"]


def find(name: str, folder: Path, ending: str) -> Path | None:
    """The first of the candidates that is a file."""
    return next((path for path in candidates(name, folder, ending) if path.is_file()), None)


def names(folder: Path, ending: str) -> list[str]:
    """The names of the files in a shipped folder and below it, sorted, without their ending."""
    files = folder.rglob(f"*{ending}")
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in files)


def recipe(name: str) -> Path:
    """A shipped recipe, whatever the current folder holds; raises `ConfigError` without one."""
    for path in candidates(name, RECIPES, ".yaml")[1:]:
        if path.is_file() and RECIPES in path.resolve().parents:
            return path
    hint = did_you_mean(name, names(RECIPES, ".yaml"))
    raise ConfigError(f"no shipped recipe '{name}'{hint}; `mhr_scale recipes` lists them")
