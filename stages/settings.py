"""Stage settings: what params say of each method after inheritance, and which prompts they name; a file each."""

from pathlib import Path

from lvlmva.entry import run
from lvlmva.params import load_params, prompts_folder
from lvlmva_core.arrays import write_json
from lvlmva_core.lvlm.prompts import CRITIC_FILES, JUDGE_FILES, prompts_digest
from lvlmva_core.samples import groups_known, read_sample_columns, read_spurious_masks, rows_of_split


def settings(params: Path, samples: Path, spurious_masks: Path, prompts: Path, settings: Path) -> None:
    """Write what each method and each prompt is made of, so that what follows runs anew only when its own changes."""
    loaded, table = load_params(params), read_sample_columns(samples, "split", "spurious")
    train = rows_of_split(table, "train")
    known = read_spurious_masks(spurious_masks, train)[1]
    loaded.check_batches(len(train))
    loaded.check_supervision(groups=groups_known(table), true_masks=bool(known.any()))
    for name, chosen in loaded.chosen_methods().items():
        write_json(settings / f"{name}.json", chosen.model_dump())
    for section, name, files in (
        ("critique", loaded.critique.prompts, CRITIC_FILES),
        ("judge", loaded.judge.prompts, JUDGE_FILES),
    ):
        folder = prompts_folder(prompts, f"{section}.prompts", name)
        write_json(settings / f"{section}_prompts.json", {"sha256": prompts_digest(folder, *files)})


if __name__ == "__main__":
    run(settings)
