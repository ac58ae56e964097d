"""The program ``meduet-fast``: each command calls one function with typed arguments; no logic here."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

import meduet_fast

from .errors import UserError
from .settings import SettingError, check_given, check_yaml

if TYPE_CHECKING:
    from .engine import FitResult

CONFIGS = Path(__file__).parent / "configs"
EXIT_FAILED, EXIT_USAGE = 1, 2

Run = Callable[[Namespace], int]


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        summary: one line for the list of commands.
        add_arguments: declares its arguments; None hands all of them on.
        run: does it; returns the exit code.
    """

    summary: str
    add_arguments: Callable[[ArgumentParser], None] | None
    run: Run


def _settings(parser: ArgumentParser, settings: type, command: str = "") -> None:
    """Add ``--config`` and an option for every field of a dataclass; a command may have packaged files."""
    names = ", ".join(sorted(_packaged(command))) if command in PACKAGED else ""
    packaged = f", or the name of a packaged one ({names})" if names else ""
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help=f"YAML file{packaged}; options behind it change single values",
    )
    parser.add_class_arguments(settings, as_group=True)


def _built(settings: type, arguments: Namespace) -> Any:
    """Build the dataclass of the parsed options.

    Raises:
        UserError: if they do not fit together.
    """
    try:
        built = settings(**{item.name: arguments[item.name] for item in fields(settings)})
    except ValueError as error:
        raise UserError(str(error)) from error
    check_given(built)
    return built


# Folder of the packaged configurations of a command.
PACKAGED = {"pretrain": CONFIGS, "synthesize train": CONFIGS / "synthesis"}


def _packaged(command: str) -> dict[str, Path]:
    return {path.stem: path for path in PACKAGED[command].glob("*.yaml")}


def _sample_data(arguments: Namespace) -> int:
    from meduet_fast.data.samples import fetch_samples

    print(f"{fetch_samples(arguments.directory)}: ready")
    return 0


def _summarise(summary: Any) -> int:
    from meduet_fast.prepare.update import format_summary

    print(format_summary(summary))
    return 0 if summary.complete else EXIT_FAILED


def _prepare_arguments(parser: ArgumentParser) -> None:
    from meduet_fast.prepare.prepare import PrepareConfig

    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        help="folder of scans, Decathlon/MONAI JSON list, nnU-Net data set folder, or YAML manifest",
    )
    parser.add_argument("--output", type=Path, required=True, help="latent store to make or to update")
    _settings(parser, PrepareConfig)


def _prepare(arguments: Namespace) -> int:
    from meduet_fast.prepare.prepare import PrepareConfig, prepare

    return _summarise(prepare(arguments.input, arguments.output, _built(PrepareConfig, arguments)))


def _import_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="cache of the published code (*_latent.nii.gz and .npy files)"
    )
    parser.add_argument("--output", type=Path, required=True, help="latent store to make or to update")
    parser.add_argument("--domain_names", type=list[str], help="names of data sets 0, 1, ...")


def _import_cache(arguments: Namespace) -> int:
    from meduet_fast.prepare.import_cache import import_reference_cache

    return _summarise(import_reference_cache(arguments.folder, arguments.output, arguments.domain_names))


def _pretrain_arguments(parser: ArgumentParser) -> None:
    from .pretraining import PretrainConfig

    parser.add_argument("--data", type=Path, help="latent store (required, unless with --dry-run)")
    parser.add_argument("--output", type=Path, help="folder of the run (required, unless with --dry-run)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all that can be checked, print parameters, FLOPs, memory, batch and steps; write nothing",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, if there is one"
    )
    parser.add_argument(
        "--init",
        type=Path,
        help="weights to begin from: an export (meduet or reference), or a checkpoint of the published code",
    )
    _settings(parser, PretrainConfig, "pretrain")


def _tell_end(result: FitResult, output: Path, steps: int) -> int:
    """Say how a run ended; return the exit code."""
    stopped_by = None if result.finished else result.stopped_by
    if result.rank == 0:  # of several processes one speaks
        if stopped_by is not None:
            print(
                f"{output}: stopped by {stopped_by.name} after step {result.step} of {steps}; a checkpoint "
                "was written, continue with --resume",
                file=sys.stderr,
            )
        else:
            print(f"{output}: {result.step} steps done")
    return 0 if stopped_by is None else 128 + stopped_by


def _require(arguments: Namespace, *names: str) -> None:
    """Refuse a run without what a dry run can do without."""
    missing = [f"--{name}" for name in names if arguments[name] is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: required, unless with --dry-run")


def _pretrain(arguments: Namespace) -> int:
    from meduet_fast.engine.dry_run import print_plan
    from meduet_fast.pretraining.dry_run import format_plan

    from .pretraining import PretrainConfig, pretrain

    config = _built(PretrainConfig, arguments)
    if arguments.dry_run:
        given = arguments.output, arguments.resume, arguments.init
        print_plan(lambda processes, local: format_plan(config, arguments.data, processes, local, *given))
        return 0
    _require(arguments, "data", "output")
    result = pretrain(arguments.data, arguments.output, config, arguments.resume, arguments.init)
    return _tell_end(result, arguments.output, config.steps)


def _sizes(_: Namespace) -> int:
    from meduet_fast.pretraining.dry_run import format_sizes

    from .pretraining import PretrainConfig

    parsed = {name: _parse("pretrain", ["--config", name]) for name in sorted(_packaged("pretrain"))}
    print(format_sizes({name: _built(PretrainConfig, arguments) for name, arguments in parsed.items()}))
    return 0


def _export_arguments(parser: ArgumentParser) -> None:
    from meduet_fast.models.export import ExportFormat
    from meduet_fast.pretraining.export import Weights

    parser.add_argument("run", type=Path, help="folder of a run that `pretrain` wrote")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="file that ends in .safetensors, or folder for model.safetensors and config.json",
    )
    parser.add_argument(
        "--format",
        type=ExportFormat,
        default="meduet",
        help="meduet: for MeDUET.from_pretrained; reference: names of the published code; monai-vit, unetr: "
        "the encoder in the names of MONAI's ViT, and of UNETR's vit",
    )
    parser.add_argument("--weights", type=Weights, default="teacher", help="which of the two networks")


def _export(arguments: Namespace) -> int:
    from meduet_fast.pretraining.export import export_run

    for path in export_run(arguments.run, arguments.output, arguments.format, arguments.weights):
        print(f"{path}: written")
    return 0


_WEIGHTS_HELP = (
    "folder of a run (the teacher of its last checkpoint), an export (meduet or reference), or a published "
    "checkpoint"
)


def _encode_arguments(parser: ArgumentParser) -> None:
    from meduet_fast.encoding import EncodeConfig

    parser.add_argument(
        "weights",
        type=Path,
        help=_WEIGHTS_HELP,
    )
    parser.add_argument("--input", type=Path, required=True, help="scans, as `prepare` takes them")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    _settings(parser, EncodeConfig)


def _encode(arguments: Namespace) -> int:
    from meduet_fast.encoding import EncodeConfig, encode_scans

    config = _built(EncodeConfig, arguments)
    summary = encode_scans(arguments.weights, arguments.input, arguments.output, config)
    print(summary)
    return 0 if summary.complete else EXIT_FAILED


def _factors_arguments(parser: ArgumentParser) -> None:
    from meduet_fast.synthesis.factors import FactorsConfig

    parser.add_argument("weights", type=Path, help=_WEIGHTS_HELP)
    parser.add_argument("--data", type=Path, required=True, help="latent store whose volumes are encoded")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    _settings(parser, FactorsConfig)


def _factors(arguments: Namespace) -> int:
    from meduet_fast.synthesis.factors import FactorsConfig, write_factors

    config = _built(FactorsConfig, arguments)
    print(write_factors(arguments.weights, arguments.data, arguments.output, config))
    return 0


def _synthesize_train_arguments(parser: ArgumentParser) -> None:
    from meduet_fast.synthesis.config import SynthesisConfig

    parser.add_argument("--data", type=Path, required=True, help="latent store")
    parser.add_argument("--factors", type=Path, required=True, help="its table, of `meduet-fast factors`")
    parser.add_argument("--output", type=Path, help="folder of the run (required, unless with --dry-run)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all that can be checked, print parameters, FLOPs, memory, batch and steps; write nothing",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, if there is one"
    )
    parser.add_argument("--init", type=Path, help=f"pretrained encoder to take weights from: {_WEIGHTS_HELP}")
    _settings(parser, SynthesisConfig, "synthesize train")


def _synthesize_train(arguments: Namespace) -> int:
    from meduet_fast.engine.dry_run import print_plan
    from meduet_fast.synthesis.config import SynthesisConfig
    from meduet_fast.synthesis.dry_run import format_plan
    from meduet_fast.synthesis.train import train_synthesis

    config = _built(SynthesisConfig, arguments)
    given = arguments.data, arguments.factors, arguments.output, config, arguments.resume, arguments.init
    if arguments.dry_run:
        print_plan(lambda processes, local: format_plan(*given, processes, local))
        return 0
    _require(arguments, "output")
    return _tell_end(train_synthesis(*given), arguments.output, config.steps)


def _synthesize_sizes(_: Namespace) -> int:
    from meduet_fast.synthesis.config import SynthesisConfig
    from meduet_fast.synthesis.dry_run import format_sizes

    command, given = "synthesize train", ["--data", "", "--factors", ""]
    parsed = {name: _parse(command, ["--config", name, *given]) for name in _packaged(command)}
    print(format_sizes({name: _built(SynthesisConfig, arguments) for name, arguments in parsed.items()}))
    return 0


def _synthesize_sample_arguments(parser: ArgumentParser) -> None:
    from meduet_fast.synthesis.sample import SampleConfig

    parser.add_argument("source", type=Path, help="folder of a run of `synthesize train`, or of a pipeline")
    parser.add_argument("--output", type=Path, required=True, help="new folder for volumes, picture, record")
    _settings(parser, SampleConfig)


def _synthesize_sample(arguments: Namespace) -> int:
    from meduet_fast.synthesis.sample import SampleConfig, sample

    print(sample(arguments.source, arguments.output, _built(SampleConfig, arguments)))
    return 0


def _synthesize_evaluate_arguments(parser: ArgumentParser) -> None:
    from meduet_fast.synthesis.judge import EvaluateConfig

    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs of `synthesize train`")
    parser.add_argument(
        "--output", type=Path, help="folder of the page; by default `evaluation` in the run, if there is one"
    )
    _settings(parser, EvaluateConfig)


def _synthesize_evaluate(arguments: Namespace) -> int:
    from meduet_fast.synthesis.evaluation import evaluate
    from meduet_fast.synthesis.judge import EvaluateConfig

    config = _built(EvaluateConfig, arguments)
    print(f"{evaluate(arguments.runs, arguments.output, config)}: open it in a browser")
    return 0


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a run that `pretrain` wrote")
    parser.add_argument("--data", type=Path, help="latent store, if it is not where the run found it")


def _report(arguments: Namespace) -> int:
    from .report import read_numbers, write_report

    page = write_report(arguments.run, arguments.data)
    print(read_numbers(arguments.run)["headline"])
    print(f"{page}: open it in a browser")
    return 0


def _train_tokenizer_arguments(parser: ArgumentParser) -> None:
    from meduet_fast.autoencoder.train import TokenizerTrainingConfig

    parser.add_argument("--input", type=Path, required=True, help="volumes, as `prepare` takes them")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, if there is one"
    )
    _settings(parser, TokenizerTrainingConfig)


def _train_tokenizer(arguments: Namespace) -> int:
    from meduet_fast.autoencoder.train import TokenizerTrainingConfig, format_metrics, train_tokenizer

    config = _built(TokenizerTrainingConfig, arguments)
    result = train_tokenizer(arguments.input, arguments.output, config, arguments.resume)
    if isinstance(result, dict):
        print(format_metrics(result))
        return 0
    return _tell_end(result, arguments.output, config.steps)


_LAUNCH_HELP = """usage: meduet-fast launch [OPTION OF TORCHRUN ...] COMMAND ...

Run pretrain or train-tokenizer in several processes, one for each GPU: as torchrun does, with its options
(`torchrun --help` lists them), but what a user can mend is said in one line by each process, and the exit
code is the command's own.

  meduet-fast launch --nproc-per-node 8 pretrain --config vit_base --data store --output run"""


def _launch(arguments: Namespace) -> int:
    from .engine.launch import launch

    if arguments.all[:1] in (["-h"], ["--help"], []):
        print(_LAUNCH_HELP)
        raise SystemExit(0 if arguments.all else EXIT_USAGE)
    return launch(arguments.all)


COMMANDS = {
    "sample-data": Command(
        "download three real volumes and make three acquisition variants of the CT",
        lambda parser: parser.add_argument("directory", type=Path, help="folder to fill") and None,
        _sample_data,
    ),
    "prepare": Command("turn volumes into a store of latents", _prepare_arguments, _prepare),
    "import-cache": Command(
        "turn a cache of the published code into a store", _import_arguments, _import_cache
    ),
    "pretrain": Command("pretrain MeDUET on a store", _pretrain_arguments, _pretrain),
    "launch": Command("run pretrain or train-tokenizer in several processes", None, _launch),
    "export": Command("write a run's weights for use elsewhere", _export_arguments, _export),
    "encode": Command("write content and style of whole scans into a table", _encode_arguments, _encode),
    "sizes": Command(
        "list the configurations of pretrain: parameters, FLOPs, memory", lambda parser: None, _sizes
    ),
    "report": Command("write a report of a run to look at", _report_arguments, _report),
    "factors": Command(
        "write content and style of a store's volumes, window by window", _factors_arguments, _factors
    ),
    "synthesize train": Command(
        "train a network that makes volumes of content and style",
        _synthesize_train_arguments,
        _synthesize_train,
    ),
    "synthesize sizes": Command(
        "list the configurations of synthesize train: parameters, FLOPs, memory",
        lambda parser: None,
        _synthesize_sizes,
    ),
    "synthesize sample": Command(
        "make volumes: the anatomy of one, the scanner of another",
        _synthesize_sample_arguments,
        _synthesize_sample,
    ),
    "synthesize evaluate": Command(
        "write a page of figures of runs that make volumes",
        _synthesize_evaluate_arguments,
        _synthesize_evaluate,
    ),
    "train-tokenizer": Command(
        "train a small tokenizer on volumes", _train_tokenizer_arguments, _train_tokenizer
    ),
}


def _parse(name: str, arguments: Sequence[str]) -> Namespace:
    """Parse and instantiate the arguments of a command.

    Raises:
        UserError: for what does not parse, or settings that do not fit together.
    """
    command = COMMANDS[name]
    if command.add_arguments is None:
        return Namespace(all=list(arguments))
    parser = ArgumentParser(
        prog=f"meduet-fast {name}", description=command.summary, exit_on_error=False, default_env=False,
        allow_abbrev=False,
    )  # fmt: skip
    command.add_arguments(parser)
    try:
        parsed = parser.parse_args(_find_packaged(name, arguments))
        for group, default in vars(parser.get_defaults()).items():
            if isinstance(default, Namespace) and not isinstance(parsed[group], Namespace):
                found = "nothing" if parsed[group] is None else parsed[group]
                raise UserError(f"{group}: found {found}, expected settings")
        return parser.instantiate(parsed)
    except SettingError as error:  # as it was typed
        options = [key for key in parsed.keys() if key.endswith(f".{error.name}")]  # noqa: SIM118
        raise UserError(str(error).replace(error.name, options[0], 1) if options else str(error)) from error
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_plain(str(error))) from error


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null"}


def _plain(message: str) -> str:
    """Say in the words of this program what the parser says of a value of the wrong kind."""
    text = " ".join(message.split())
    key = re.match(r'Parser key "([^"]+)"', text)
    kinds = [_KINDS.get(kind) for kind in re.findall(r"Expected a <class '(\w+)'>", text)]
    kinds += [word for words in re.findall(r"Literal\[(.*?)\]", text) for word in words.split(", ")]
    value = re.search(r".*(?:Got|Given) value: (.*)$", text)
    if key is None or value is None or not kinds or None in kinds:
        return text
    return f"{key[1]}: found {value[1]}, expected {' or '.join(filter(None, kinds))}"


def _find_packaged(name: str, arguments: Sequence[str]) -> list[str]:
    """Replace the name of a packaged configuration behind ``--config`` by its path."""
    found = list(arguments)
    for position, argument in enumerate(found):
        option, equals, value = argument.partition("=")
        if option != "--config" or (not equals and position + 1 == len(found)):
            continue
        value = value if equals else found[position + 1]
        packaged = _packaged(name) if name in PACKAGED else {}
        if value in packaged:
            found[position if equals else position + 1] = (
                f"--config={packaged[value]}" if equals else str(packaged[value])
            )
        elif not Path(value).is_file():
            known = f", and not one of the packaged ones ({', '.join(sorted(packaged))})" if packaged else ""
            raise UserError(f"--config {value}: no such file{known}")
        else:
            check_yaml(Path(value))  # the parser's own words on a syntax error do not name the file
    return found


def split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Divide what was typed into the command, of one word or two, and its arguments."""
    count = 2 if " ".join(words[:2]) in COMMANDS else 1
    return " ".join(words[:count]), list(words[count:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code: 0 done, 1 some inputs failed, 2 bad usage or input."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that knows no umlauts gets escapes
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] == "--version":
        print(meduet_fast.__version__)
        return 0
    if not given or given[0] in ("-h", "--help"):
        print("usage: meduet-fast COMMAND ... (meduet-fast COMMAND --help tells more)\n\ncommands:")
        for name, command in COMMANDS.items():
            print(f"  {name:20} {command.summary}")
        return 0 if given else EXIT_USAGE
    name, rest = split_command(given)
    if name not in COMMANDS:
        print(f"meduet-fast: no command {name!r}, expected one of: {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USAGE
    try:
        return COMMANDS[name].run(_parse(name, rest))
    except UserError as error:
        # One line: parsers and libraries like to explain over several.
        print(f"meduet-fast {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        if error.errno is None:
            raise
        what = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        print(f"meduet-fast {name}: {what}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"meduet-fast {name}: interrupted", file=sys.stderr)
        return 130
