"""The folder of a run."""

from pathlib import Path

from mtkd_env.errors import ConfigError


def make_new(folder: Path) -> bool:
    """Makes a folder; whether it was not there before.

    Raises:
        ConfigError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.parent.is_dir():
            raise ConfigError(f"output: {folder.parent} is a file, expected a folder") from None
        return False
    except NotADirectoryError:
        raise ConfigError(f"output: {folder.parent} is no folder, or in none") from None
    except OSError as error:
        raise ConfigError(f"output: cannot make {folder}: {error.strerror}") from error
    return True
