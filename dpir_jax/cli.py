"""The `dpir` command: one thin function per verb, no logic of its own."""

import argparse
import sys
from collections.abc import Sequence

from dpir_jax.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status. Bad input prints one line and returns 2."""
    parser = argparse.ArgumentParser(prog="dpir", description="Restore degraded photographs with diffusion models, in JAX.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_add_restore, _add_degrade, _add_evaluate, _add_train, _add_export, _add_models):
        add(verbs)
    arguments, extra = parser.parse_known_args(argv)
    if extra and arguments.verb != "train":  # `train` passes --config.field=value on to the recipe
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    arguments.extra = extra
    try:
        return arguments.run(arguments) or 0
    except InputError as error:
        print(f"dpir: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dpir: interrupted", file=sys.stderr)
        return 130


# --- restore ---------------------------------------------------------------------------------------------------------


def _add_restore(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("restore", help="restore photos")
    verb.set_defaults(run=_restore)


def _restore(arguments: argparse.Namespace) -> int:
    raise InputError("restore is not wired up yet")


# --- degrade ---------------------------------------------------------------------------------------------------------


def _add_degrade(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("degrade", help="make low-quality pairs from good photos")
    verb.set_defaults(run=_degrade)


def _degrade(arguments: argparse.Namespace) -> int:
    raise InputError("degrade is not wired up yet")


# --- evaluate --------------------------------------------------------------------------------------------------------


def _add_evaluate(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("evaluate", help="measure restored photos")
    verb.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    raise InputError("evaluate is not wired up yet")


# --- train -----------------------------------------------------------------------------------------------------------


def _add_train(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("train", help="train a model by a recipe")
    verb.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    raise InputError("train is not wired up yet")


# --- export ----------------------------------------------------------------------------------------------------------


def _add_export(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("export", help="turn a training checkpoint into a model folder")
    verb.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    raise InputError("export is not wired up yet")


# --- models ----------------------------------------------------------------------------------------------------------


def _add_models(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("models", help="list the models that `--model` knows")
    verb.set_defaults(run=_models)


def _models(arguments: argparse.Namespace) -> int:
    raise InputError("models is not wired up yet")
