"""The same job on a Ray cluster: Ray Data hands the shards to refiners, and hands those of a dead one to another."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transfiner_refine.bulk.parts import Parts, pack
from transfiner_refine.bulk.work import Work
from transfiner_refine.errors import InvalidInputError, MissingDependencyError, TransfinerError


class ShardRefiner:
    """One refiner of the cluster: a process that keeps its model, and refines a shard per call.

    Args:
        work: What to refine, and how.
    """

    def __init__(self, work: Work):
        self.work = work
        self.refiner = work.load_refiner()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Refine a shard.

        Args:
            row: ``shard``, its number, and ``start`` and ``stop``, its images.

        Returns:
            ``shard``, ``content`` and ``error``, of which one is empty: an error of the input would end the job the
            same way on any worker, so that it must not be tried again.
        """
        try:
            content = pack(list(self.work.run(self.refiner, range(row["start"], row["stop"]))))
        except TransfinerError as error:
            return {"shard": row["shard"], "content": b"", "error": str(error)}
        return {"shard": row["shard"], "content": content, "error": ""}


def shards_on_ray(
    work: Work, parts: Parts, pending: list[int], address: str | None, workers: int | None
) -> Iterator[tuple[int, bytes]]:
    """Refine shards on a cluster.

    Workers read images and masks from where the source says, so these must lie on a file system that all share, and
    the package must be installed on all; what they make comes back to this process, which alone writes.

    Args:
        work: What to refine, and how: a worker has ``work.threads`` cores, and a GPU if ``work.device`` is one.
        parts: The job's folder.
        pending: The shards.
        address: Of the cluster; None starts one on this machine for the time of the job.
        workers: Refiners; None for as many as the cluster has room for.

    Yields:
        Number and content of each shard, as they are finished.

    Raises:
        MissingDependencyError: If Ray is not installed.
        InvalidInputError: If there is no such cluster, it has no room for a single worker, or an image cannot be
            refined in a strict job.
    """
    _set_environment(own_cluster=address is None)
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(
            "expected Ray for --engine ray, which is not installed: pip install 'transfiner-refine[ray]'"
        ) from error
    needs = {"CPU": work.threads, "GPU": int(str(work.device).startswith("cuda"))}
    with _cluster(ray, address):
        resources = ray.cluster_resources()
        room = min(int(resources.get(name, 0) // need) for name, need in needs.items() if need)
        if not 1 <= (workers or 1) <= room:
            raise InvalidInputError(
                f"expected 1 to {room} workers, each of {needs['CPU']} CPUs and {needs['GPU']} GPUs, in a cluster of "
                f"{resources.get('CPU', 0):.0f} and {resources.get('GPU', 0):.0f}, got {workers}: change --workers or "
                "--threads"
            )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = []
        for shard in pending:
            images = parts.images_of(shard)
            rows.append({"shard": shard, "start": images.start, "stop": images.stop})
        if not rows:
            return
        # One block per shard: the unit that a worker takes, and that is done again if it dies.
        dataset: Any = ray.data.from_items(rows, override_num_blocks=len(rows))  # Any: its types know no classes
        shards = dataset.map(
            ShardRefiner,
            fn_constructor_args=(work,),
            num_cpus=needs["CPU"],
            num_gpus=needs["GPU"] or None,
            concurrency=min(workers or room, len(rows)),
        )
        for row in shards.iter_rows():
            if row["error"]:
                raise InvalidInputError(row["error"])
            yield int(row["shard"]), bytes(row["content"])


def _set_environment(own_cluster: bool) -> None:
    """Set what Ray reads when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports nothing
    if own_cluster and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # Only this process and its workers can join; without a token at hand, Ray would write one to the home folder.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """Join a cluster, or start one on this machine whose files go when it does."""
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InvalidInputError(
                f"expected a Ray cluster at {address!r}, got: {' '.join(str(error).split())}; start one with ray start"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()
        return
    # Not below TMPDIR: the paths of its sockets must stay shorter than 108 bytes.
    folder = tempfile.mkdtemp(prefix="tr-", dir="/tmp")
    try:
        ray.init(
            address="local", include_dashboard=False, log_to_driver=False, logging_level="warning", _temp_dir=folder
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
