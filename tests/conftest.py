"""What every test shares: one thread per process, and one cache of prepared corpora per session."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts; child processes inherit it

from collections.abc import Iterator

import pytest
import torch

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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESAIC_CACHE", str(folder / "moesaic-cache"))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A test that raised the number of threads does not slow down the ones after it."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
