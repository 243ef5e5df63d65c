"""Makes the project's golden sets, or checks stored ones against a fresh run.

    python generate.py --out DIR [--only jax|extended|sequences]
    python generate.py --check DIR [--only jax|extended|sequences]

README.md beside this file says what the sets are and how they are laid out.
"""

import argparse
import importlib
import pathlib
import sys
import tempfile

SETS = ("extended", "sequences", "jax")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", metavar="DIR", type=pathlib.Path, help="write DIR/jax and so on")
    action.add_argument(
        "--check", metavar="DIR", type=pathlib.Path, help="compare DIR/jax and so on"
    )
    parser.add_argument("--only", choices=SETS, help="one set instead of both")
    return parser.parse_args()


def why_not(set_name):
    """Why a set cannot be generated here, or None."""
    # Submodules, because the folder `jax` beside this file would pass for an (empty) package of that name.
    needed = ("numpy.linalg", "jax.numpy") if set_name == "jax" else ("numpy.linalg",)
    for module in needed:
        try:
            importlib.import_module(module)
        except (ImportError, RuntimeError) as error:
            return f"{module.split('.')[0]} cannot be imported ({error})"
    return None


def generate_set(set_name, directory):
    """Generates one set into `directory`."""
    # Here and not at the top, because --check has an answer even without NumPy.
    import extended_set
    import jax_set
    import sequences_set
    import storage

    module = {"extended": extended_set, "sequences": sequences_set, "jax": jax_set}[set_name]
    storage.write_set(directory, *module.generate(print))


def check_set(set_name, directory):
    """Compares one stored set with a fresh run; prints and returns how many differences there are."""
    import compare

    with tempfile.TemporaryDirectory() as temporary:
        fresh = pathlib.Path(temporary) / set_name
        generate_set(set_name, fresh)
        found = compare.differences_of_sets(directory, fresh)
    for sentence in found:
        print(sentence)
    print(f"{set_name}: {'as stored' if not found else f'{len(found)} differences'}")
    return len(found)


def main():
    arguments = parse_arguments()
    failures = 0
    for set_name in [arguments.only] if arguments.only else SETS:
        reason = why_not(set_name)
        if reason is not None and arguments.check:
            print(f"{set_name}: skipped, {reason}")
        elif reason is not None:
            print(f"{set_name}: {reason}; see requirements.txt")
            failures += 1
        elif arguments.check:
            failures += check_set(set_name, arguments.check / set_name)
        else:
            generate_set(set_name, arguments.out / set_name)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
