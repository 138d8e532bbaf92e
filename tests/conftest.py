"""What every test shares: one thread per process, one cache of prepared corpora per session, compiled kernels."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts; child processes inherit it

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from moesaic.kernels.cache import cache_folder

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before triton is imported: its kernels then run on tensors of the CPU
    )


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Corpora are prepared once per session: the workers of pytest-xdist share the folder."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    cache = folder / "moesaic-cache"
    libraries = cache / "kernels"
    libraries.mkdir(parents=True, exist_ok=True)
    for built in (cache_folder() / "kernels").glob(
        "*.so"
    ):  # named by their sources; to compile takes ten seconds
        with suppress(FileExistsError):  # another worker's
            (libraries / built.name).symlink_to(built)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESAIC_CACHE", str(cache))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A test that raised the number of threads does not slow down the ones after it."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none; what takes Triton's interpreter seconds is slow there."""
    for item in items:
        if item.get_closest_marker("slow_interpreted") and "triton" in item.callspec.params.values():  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
