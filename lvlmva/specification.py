"""The specification behind the review page: what an edit costs, saving it, and what corrections say (an extension)."""

import asyncio
import difflib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lvlmva.ask import confirm_host, describe, open_calls, save_elsewhere
from lvlmva.params import Params, load_params, prompts_folder
from lvlmva.shared import share_calls
from lvlmva_core.corrections import ENOUGH, Judged, corrections_of, judged_regions
from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.budget import Spent, estimate_calls, estimate_input_tokens, price_is_known
from lvlmva_core.lvlm.calls import Call, CallStore, Record, answer_text, note
from lvlmva_core.lvlm.cases import Case, read_cases
from lvlmva_core.lvlm.client import CallFailedError, Client, NotInStoreError, Question, check_endpoint, model_name
from lvlmva_core.lvlm.critic import ask_critic, critic_call, critic_text
from lvlmva_core.lvlm.judge import judge_call
from lvlmva_core.lvlm.prompts import (
    Prompts,
    Specification,
    load_critic_prompts,
    load_judge_prompts,
    load_proposal_prompts,
    parse_specification,
)
from lvlmva_core.lvlm.settings import Endpoint, ModelCritic, ModelJudge
from lvlmva_core.lvlm.specification_edit import edited
from lvlmva_core.overrides import locked, read_reviews, resolve, standing
from lvlmva_core.proposal import proposal_call, read_proposal, why_no_proposal
from lvlmva_core.store import replace_file


@dataclass(frozen=True)
class Plan:
    """What saving an edit does. diff: of the file. shown: digest of the text that would be saved. lines: the price, in
    words. samples: whose prompt changes."""

    diff: str
    shown: str
    lines: list[str]
    samples: int


class Editor:
    """The specification that critique.prompts names.

    known: name -> path, of dvc.yaml.
    """

    def __init__(self, known: dict[str, Path]) -> None:
        self._known = known

    def params(self) -> Params:
        """params.yaml as it is now."""
        return load_params(self._known["params"])

    def file(self) -> Path:
        """The specification's file. Raises InputError where critique.prompts names no folder."""
        return self._folder() / "specification.yaml"

    def read(self) -> tuple[Specification, str]:
        """What the file says, and the digest of its text."""
        text = self._text()
        return parse_specification(text, self.file()), _digest(text)

    def plan(self, wanted: Specification, digest: str) -> Plan:
        """What it takes to have `wanted` in the place of what the file says.

        Args:
            digest: of the text that the edit began with.

        Raises:
            InputError: the file has changed since, or the edit cannot be saved.
        """
        before, after = self._edit(wanted, digest)
        name = self.file().as_posix()
        diff = difflib.unified_diff(before.splitlines(), after.splitlines(), name, f"{name} (new)", lineterm="")
        lines, samples = self._price(wanted)
        return Plan("\n".join(diff), _digest(after), lines, samples)

    def save(self, wanted: Specification, digest: str, shown: str) -> str:
        """Write it; the digest of what the file says then.

        Args:
            digest, shown: as for and from `plan`: what is saved is what was shown.

        Raises:
            InputError: the file has changed since, or `wanted` is not what was shown; nothing is written then.
        """
        with locked(self._known["overrides"]):  # not beside the file: DVC follows the whole folder
            _, after = self._edit(wanted, digest)
            if _digest(after) != shown:
                raise InputError(f"{self.file()}: this is not the change that was shown; look at it again")
            replace_file(self.file(), after.encode())
        return shown

    def judged(self) -> list[Judged]:
        """Every region with a verdict of the critic, and the experts' where they differ.

        Raises:
            InputError: a stage did not run yet, or a reviewer's file is malformed.
        """
        from lvlmva_core.arrays import read_array, read_attrs
        from lvlmva_core.lvlm.records import CritiqueRow, VerdictRow, read_rows
        from lvlmva_core.regions import segmentation_digest
        from lvlmva_core.samples import read_class_names, read_samples, rows_of_ids

        known = self._known
        for name, stage in {"segments": "segment", "attributions": "attribute", "verdicts": "judge"}.items():
            if not known[name].exists():
                raise InputError(f"{known[name]}: not made yet; run `dvc repro {stage}`")
        ids = [str(sample) for sample in read_attrs(known["segments"])["ids"]]
        if read_attrs(known["attributions"])["ids"] != ids:
            raise InputError(f"{known['attributions']}: other samples than the segmentations; run `dvc repro segment`")
        table, class_names = read_samples(known["samples"]), read_class_names(known["images"])
        labels = table["label"].to_numpy()[rows_of_ids(table, ids)]
        label_maps = read_array(known["segments"], "segments")
        digests = [segmentation_digest(label_map) for label_map in label_maps]
        verdicts = {row.sample: row for row in read_rows(known["verdicts"], VerdictRow)}
        for sample, digest in zip(ids, digests, strict=True):
            if sample in verdicts and verdicts[sample].segmentation != digest:
                raise InputError(f"{known['verdicts']}: '{sample}' is of another segmentation; run `dvc repro judge`")
        events = read_reviews(known["overrides"]).events
        notes: dict[tuple[str, str, int], list[str]] = {}
        for reviewer in sorted({event.reviewer for event in events}):
            for key, event in standing([each for each in events if each.reviewer == reviewer]).items():
                notes.setdefault(key, []).extend([event.note] if event.note else [])
        return judged_regions(
            ids,
            [class_names[int(label)] for label in labels],
            label_maps,
            read_array(known["attributions"], "attributions"),
            digests,
            {row.sample: row for row in read_rows(known["critiques"], CritiqueRow)},
            verdicts,
            resolve(events)[0],
            notes,
        )

    def model(self) -> tuple[ModelCritic | ModelJudge, str, bool] | None:
        """Who is asked for a proposal: settings, section, whether only the store may answer; None without a model."""
        loaded = self.params()
        offline = os.environ.get("LVLMVA_OFFLINE", "") not in ("", "0")
        if isinstance(loaded.critique, ModelCritic):
            return loaded.critique, "critique.endpoint", offline or loaded.critique.critic == "replay"
        if isinstance(loaded.judge, ModelJudge):
            return loaded.judge, "judge.endpoint", offline or loaded.judge.judge == "replay"
        return None

    def question(self) -> dict[str, Any]:
        """What asking for a proposal would send and cost; nothing is sent.

        Raises:
            InputError: no model is configured, there are too few corrections, or the specification is malformed.
        """
        call, config, section, replay = self._call()
        calls = open_calls(self._known["critiques"])
        new = [] if calls.find(call.keys()) is not None else [estimate_input_tokens(call)]
        estimate = estimate_calls(config.endpoint, hits=1 - len(new), tokens=new)
        text = str(call.request()["body"]["messages"][0]["content"])
        return {
            "model": model_name(config.endpoint),
            "price": describe(estimate, config.endpoint, section),
            "free": not new,
            "replay": replay,
            "text": text,
            "shown": call.key(),
        }

    def propose(self, shown: str) -> dict[str, Any]:
        """Ask for a proposal, from the store if it is there, else bought within the endpoint's budget and kept.

        Args:
            shown: of `question`: what is asked is what was shown.

        Raises:
            InputError: it is not what was shown, nothing can be bought, or no answer is usable.
        """
        call, config, section, replay = self._call()
        if call.key() != shown:
            raise InputError("corrections or specification have changed since the price was shown; look at it again")
        record, spent = asyncio.run(self._ask(config, section, replay))
        now, digest = self.read()
        found = read_proposal(answer_text(record), now)
        return {
            "model": model_name(config.endpoint),
            "why": found.why,
            "specification": as_json(found.specification),
            "digest": digest,
            "spent": f"{spent.calls} calls, {spent.cost_usd:.4f} USD" if spent.calls else "from the store, 0 calls",
        }

    async def _ask(self, config: ModelCritic | ModelJudge, section: str, replay: bool) -> tuple[Record, Spent]:
        endpoint = config.endpoint
        now, _ = self.read()

        def prepare() -> str:
            if replay:
                return ""
            key = check_endpoint(endpoint, os.environ, pictures=False)
            confirm_host(endpoint, ask=False)  # nobody sits at the terminal of a server
            return key

        calls = open_calls(self._known["critiques"])
        client = Client(endpoint, section, calls, prepare, replay, save_elsewhere, shared=share_calls(calls))
        built = {index: self._call(index)[0] for index in range(config.max_attempts)}

        async def answer(index: int) -> Record:
            question = Question(
                built[index].keys(), lambda: built[index], "a proposal", lambda text: why_no_proposal(text, now)
            )
            return await client.ask(question)

        try:
            async with client:
                record = await ask_critic(answer, max_attempts=config.max_attempts, beyond=client.beyond.add)
        except CallFailedError as error:
            raise InputError(f"the model's answer is no proposal: {error}; what was paid is kept; ask again") from None
        except NotInStoreError:
            raise InputError(
                "only the store may answer (replay, or LVLMVA_OFFLINE), and it holds no proposal"
            ) from None
        finally:
            if client.spent.calls:
                spent = {name: value for name, value in asdict(client.spent).items() if value}
                note(calls.store, "runs.jsonl", {"section": section, "model": endpoint.model, **spent})
        return record, client.spent

    def _call(self, index: int = 0) -> tuple[Call, ModelCritic | ModelJudge, str, bool]:
        asked = self.model()
        if asked is None:
            raise InputError("no model is configured; `lvlmva preset critics/...` chooses one")
        corrections = corrections_of(self.judged())
        if len(corrections) < ENOUGH:
            raise InputError(f"{len(corrections)} corrections; a proposal is made from {ENOUGH} on")
        prompts = load_proposal_prompts(self._folder())
        call = proposal_call(asked[0].endpoint, prompts, self.read()[0], corrections, index=index)
        return call, *asked

    def _folder(self) -> Path:
        return prompts_folder(self._known["prompts"], "critique.prompts", self.params().critique.prompts)

    def _text(self) -> str:
        file = self.file()
        try:
            with file.open(encoding="utf-8", newline="") as opened:
                return opened.read()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read ({error}); restore it with `git checkout {file}`") from error

    def _edit(self, wanted: Specification, digest: str) -> tuple[str, str]:
        before = self._text()
        if _digest(before) != digest:
            raise InputError(
                f"{self.file()}: has changed since you began, in another tab or an editor; copy your words, load the "
                "page anew and put them in"
            )
        return before, edited(before, wanted, self.file())

    def _price(self, wanted: Specification) -> tuple[list[str], int]:
        """What asking anew would cost, in words; and the samples whose prompt changes."""
        loaded = self.params()
        critics = loaded.critique.all_critics()
        models = [(place, each) for place, each in enumerate(critics) if isinstance(each, ModelCritic)]
        stand_ins = sorted({str(each.critic) for each in critics if not isinstance(each, ModelCritic)})
        lines = [
            f"The stand-in '{name}' does not read the specification: its verdicts stay, nothing is asked."
            for name in stand_ins
        ]
        if not models:
            return lines, 0
        cases, class_names = self._cases(loaded)
        now = load_critic_prompts(self._folder(), class_names)
        then = replace(now, specification=wanted)
        most, new = 0, 0
        for place, critic in models:
            changed = _changed(now, then, critic.name_spurious_feature, class_names)
            about = [case for case in cases if case.class_name in changed and case.regions()]
            most = max(most, len(about))
            if not about:
                continue
            section = "critique.endpoint" if place == 0 else f"critique.critics[{place - 1}].endpoint"
            calls = [_critic_call(critic, then, case, index) for case in about for index in range(critic.answers())]
            bought, line = _priced(open_calls(self._known["critiques"]), calls, critic.endpoint, section)
            new += bought
            lines.append(line)
        if not most:
            quiet = wanted.spurious_features != (now.specification and now.specification.spurious_features)
            why = " (critique.name_spurious_feature is false: spurious features stand in no prompt)" if quiet else ""
            return [*lines, f"No prompt about the alignment set changes: nothing is asked anew{why}."], 0
        if loaded.critique.cascade is not None:
            lines.append("A cascade asks its last critic about fewer samples than that.")
        lines += self._price_of_judging(loaded, new)
        return [*lines, "Nothing is asked before you run `dvc repro`."], most

    def _price_of_judging(self, loaded: Params, critiques: int) -> list[str]:
        judge = loaded.judge
        if not isinstance(judge, ModelJudge) or not critiques:
            return []
        folder = prompts_folder(self._known["prompts"], "judge.prompts", judge.prompts)
        limits = [each.endpoint.token_limit for each in loaded.critique.all_critics() if isinstance(each, ModelCritic)]
        text = "a word " * (max(limits) // 2)  # as long as a critique may be
        form = judge.answer_format
        one = judge_call(judge.endpoint, load_judge_prompts(folder), text, ["red"], answer_format=form, earlier=[])
        estimate = estimate_calls(judge.endpoint, hits=0, tokens=[estimate_input_tokens(one)] * critiques)
        cost = f"at most {estimate.cost_usd_at_most:.4f} USD" if price_is_known(judge.endpoint) else "an unknown price"
        return [f"judge.endpoint: new critiques need new verdicts: {critiques} calls or more, {cost} for as many"]

    def _cases(self, loaded: Params) -> tuple[list[Case], list[str]]:
        from lvlmva_core.independence import read_independent
        from lvlmva_core.lvlm.not_asked import cases_to_ask

        known = self._known
        if not known["segments"].exists():
            raise InputError(f"{known['segments']}: not made yet; run `dvc repro segment`")
        cases, class_names = read_cases(
            known["images"],
            known["samples"],
            known["segments"],
            known["attributions"],
            known["spurious_masks"],
            with_truth=False,
        )
        at_most = loaded.critique.independent_at_most
        if at_most is not None:
            independent = read_independent(known["reliance"], [case.sample for case in cases], at_most)
            cases = cases_to_ask(cases, independent)
        return cases, class_names


def as_json(specification: Specification) -> dict[str, Any]:
    """Picture, classes in their order, spurious features."""
    classes = [{"name": name, "description": words} for name, words in specification.classes.items()]
    return {
        "picture": specification.picture,
        "classes": classes,
        "spurious_features": list(specification.spurious_features),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _critic_call(critic: ModelCritic, prompts: Prompts, case: Case, index: int) -> Call:
    return critic_call(
        critic.endpoint,
        prompts,
        case.class_name,
        case.picture,
        case.segments,
        name_spurious_feature=critic.name_spurious_feature,
        overlay=critic.overlay,
        index=index,
    )


def _changed(now: Prompts, then: Prompts, named: bool, class_names: Sequence[str]) -> set[str]:
    """Classes whose prompt changes."""
    return {
        name
        for name in class_names
        if critic_text(now, name, ["red"], name_spurious_feature=named)
        != critic_text(then, name, ["red"], name_spurious_feature=named)
    }


def _priced(store: CallStore, calls: Sequence[Call], endpoint: Endpoint, section: str) -> tuple[int, str]:
    """How many calls are to be bought, and the plan in words, as the stage says it before it buys."""
    asked = {call.key(): call for call in calls}
    new = [estimate_input_tokens(call) for call in asked.values() if store.find(call.keys()) is None]
    return len(new), describe(estimate_calls(endpoint, hits=len(asked) - len(new), tokens=new), endpoint, section)
