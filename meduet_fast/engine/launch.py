"""Start the processes of a run as torchrun does, which would add an error of its own to theirs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

from meduet_fast.errors import UserError


def launch(arguments: Sequence[str]) -> int:
    """Run a command of this program in several processes, each of which tells its own errors.

    Args:
        arguments: options of torchrun, the command, and what is the command's.

    Returns:
        0; or the exit code of the process that failed first; or 128 plus the number of the signal that ended
        it, or this process.

    Raises:
        UserError: if no processes could be started: options that make no sense, a machine out of reach.
    """
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = parse_args(list(arguments))
    options.training_script_args = [options.training_script, *options.training_script_args]
    options.module, options.training_script = True, "meduet_fast"
    try:
        run(options)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    except (ValueError, RuntimeError, RendezvousError) as error:
        raise UserError(f"the processes could not be started: {error or type(error).__name__}") from error
    except AssertionError as error:  # the one that it makes of an option
        raise UserError("--nproc-per-node: expected 1 or more") from error
    return 0
