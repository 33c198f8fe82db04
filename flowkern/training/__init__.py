"""Training on Lightning, evaluation, and the figures and pictures that both leave.

Needs the extra: ``pip install "flowkern[train]"``. Lightning itself is only imported by ``train``.
"""

import os
from pathlib import Path
from typing import Any

from ._codecs import codec_table as codec_table
from ._compare import compare as compare
from ._evaluate import (
    Diverged as Diverged,
    Score as Score,
    context_of as context_of,
    evaluate as evaluate,
    importance_nlls as importance_nlls,
    needed_draws as needed_draws,
    negative_log_likelihood as negative_log_likelihood,
    sample_nlls as sample_nlls,
    usable_device as usable_device,
)
from ._gallery import save_samples as save_samples
from ._pictures import atomic as atomic, read_log as read_log, save_grid as save_grid, to_pixels as to_pixels
from ._plan import (
    OPTIMIZERS as OPTIMIZERS,
    PRESETS as PRESETS,
    Plan as Plan,
    make_plan as make_plan,
    make_prior_plan as make_prior_plan,
    resumed_plan as resumed_plan,
    trained_on as trained_on,
)


def train(plan: Plan, out: str | os.PathLike[str], **options: Any) -> Score | None:
    """Train as ``plan`` says, and write to the folder ``out``.

    ========================== ==========================================================================
    file                       what
    ========================== ==========================================================================
    ``best.ckpt``              the epoch with the lowest validation NLL; ``flowkern.load`` reads it
    ``last.ckpt``              where to resume
    ``log/version_*/``         the CSV log, one for each time the run was started or resumed
    ``curve.png``              training and validation NLL
    ``samples.png``            64 samples, for images; of a conditional model one class after the other
    ``samples-T.png``          the same at the temperatures T = 0.6 and 0.8
    ``interpolations.png``     from one test image to another, along a line between their latents
    ``reconstructions.png``    test images, and under them what comes back from their latents
    ``traversals.png``         of VAEs: a test image with one latent after the other moved
    ``analogies.png``          of VAEs: what is to c as b is to a
    ``.lock``                  held while a run writes here: there is one at a time
    ``result.json``            the test NLL of ``best.ckpt`` with its standard error, and the plan
    ========================== ==========================================================================

    Options:
        resume: continue from ``last.ckpt``. On the CPU the weights are bit for bit those of a run that was not
            interrupted; without a ``last.ckpt`` the run starts anew. The data must be what it was, by their number, shape,
            values and labels; older checkpoints tell of levels and classes alone.
        overwrite: start anew where ``out`` holds a run.
        max_minutes: stop after so much training, counted over all resumed runs. The epoch that it ends in is cut short.
        precision, devices, strategy, accelerator: as Lightning's ``Trainer`` takes them. The global batches do not
            depend on the number of devices. Under ``"bf16-mixed"`` the conditioners run in bfloat16; weights, the state of
            the flow, log-determinants and the loss stay in float32.
        nodes: the number of machines, each with so many ``devices``.
        channels_last: keep images and the weights of convolutions in the channels_last memory format.
        workers: processes that prepare batches.
        checkpoint_steps: write ``last.ckpt`` every so many steps and every epoch, instead of every ten seconds or so.
        draws: of dequantization noise for the test NLL.

    Returns the test score, on the first rank; None on the others, and where the time was over before the first validation.

    Raises:
        ValueError: ``out`` holds a run and neither ``resume`` nor ``overwrite`` is given; another run is writing there; data
            or a model that do not fit, or that changed; options out of range, as more ``devices`` or ``workers`` than CPU
            cores; a checkpoint that is not whole, or whose ``best.ckpt`` is missing.
        flowkern.training.Diverged: the loss is not finite; the message names the step.
        OSError: a file cannot be written. The checkpoint before it is untouched.
    """
    from ._run import run

    return run(plan, Path(out), **options)


def table(data: str, out: str | os.PathLike[str], **options: Any) -> str:
    """Train the rows of the table of ``data`` into the folder ``out``, and return it in Markdown: see ``_table.table``."""
    from ._table import table as build

    return build(data, Path(out), **options)
