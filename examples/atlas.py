"""VMM-scVI on cells that need not fit in memory, in one process or several.

    python examples/atlas.py CELLS
    torchrun --nproc-per-node 2 examples/atlas.py CELLS
    sbatch examples/atlas.sbatch CELLS

CELLS is an .h5ad file, a .zarr folder or a folder of .h5ad files: counts in X, the batch of each
cell in obs["batch"] (or --batch-key). Every process, on a GPU or a few cores, trains on cells of
its own; all take the same steps, each with --batch-size cells of every process. The first saves the
model, for VMMSCVI.load.

Where one fails the others end too, and torchrun names it ("Root Cause"). Where one hangs, on a disk
that does not answer for instance, the others end after --timeout; torchrun then kills it, and gives
"exitcode: -9" for it. The first writes a checkpoint every --checkpoint-seconds, beside the model.
With --resume and as many processes the same command goes on from it, as if it had not been stopped;
where none was written yet, it starts from the beginning.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path

import scvi
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

from vmm_fast.cells import CellStore
from vmm_fast.scvi import VMMSCVI, CellDataModule, Checkpoints


def main() -> None:
    """Train a model and save it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cells", metavar="CELLS")
    parser.add_argument("--out", default="atlas-model", help="folder of the model")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--batch-size", type=int, default=128, help="cells, of each process")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--components", type=int, default=100)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--checkpoint-seconds", type=float, default=300, help="between two")
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        help="seconds to wait for a process that hangs; must be more than a window of cells takes "
        "to be read, or the model or a checkpoint to be written",
    )
    args = parser.parse_args()
    checkpoint = Path(f"{Path(args.out)}.ckpt")
    if checkpoint.exists() and not args.resume:
        parser.error(f"{checkpoint} is of a run that was stopped: --resume it, or remove it")
    if Path(args.out).exists() and not checkpoint.exists():
        parser.error(f"{args.out} exists: remove it, or choose another --out")
    resume = checkpoint.exists()
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    # As torchrun tells them; without it there is one process.
    rank, processes, on_this_machine = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    )

    if args.resume and not resume and rank == 0:
        print(f"{checkpoint} was not written yet: starts from the beginning", flush=True)

    with CellStore(args.cells) as store:
        some = store.sample(20_000, keys=[args.batch_key])  # pseudo-cells start from them
        VMMSCVI.setup_anndata(some, batch_key=args.batch_key)
        # Noise differs between processes. Parameters do not: all begin with those of the first.
        scvi.settings.seed = rank
        model = VMMSCVI(some, n_components=args.components)
        batches = store.column(args.batch_key).codes
        several = DDPStrategy(find_unused_parameters=True, timeout=timedelta(seconds=args.timeout))
        model.train(
            args.epochs,
            datamodule=CellDataModule(store, batches, batch_size=args.batch_size),
            devices=on_this_machine,
            num_nodes=processes // on_this_machine,
            strategy="auto" if processes == 1 else several,
            check_val_every_n_epoch=1,
            enable_progress_bar=rank == 0,
            logger=False,
            callbacks=[Checkpoints(checkpoint, seconds=args.checkpoint_seconds)],
            ckpt_path=checkpoint if resume else None,
        )
    if rank == 0:
        model.save(args.out, overwrite=True)
        checkpoint.unlink()
        print(f"{args.out}: trained with {processes} process{'es' * (processes > 1)}")
    if processes > 1:
        distributed.barrier()  # one that leaves before the others would break their connections
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
