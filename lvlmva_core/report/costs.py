"""What was asked of models, and what that cost: from the records of the calls."""

from collections.abc import Iterable, Mapping
from typing import Any

from lvlmva_core.lvlm.budget import cost_usd, price_is_known
from lvlmva_core.lvlm.settings import Endpoint
from lvlmva_core.report.gallery import Gallery

Endpoints = Mapping[str, Endpoint]  # model -> where it was asked


def costs_of(gallery: Gallery, endpoints: Endpoints) -> str:
    """Calls, tokens and costs at the prices in params, in a sentence; a call that several rows hold counts once."""
    calls: dict[str, list[tuple[int, int]]] = {}
    seen = set()
    for record in _records(gallery):
        if record["key"] in seen:
            continue
        seen.add(record["key"])
        usage = record["response"].get("usage") or {}
        tokens = (_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))
        calls.setdefault(str(record["request"]["model"]), []).append(tokens)
    if not calls:
        return "No model was called: it cost nothing."
    said = []
    for model, of_model in sorted(calls.items()):
        inputs, outputs = (sum(each[place] for each in of_model) for place in (0, 1))
        endpoint = endpoints.get(model)
        if endpoint is None or not price_is_known(endpoint):
            cost = "at an unknown price"
        else:
            cost = f"{cost_usd(endpoint, inputs, outputs):.2f} USD"
        said.append(f"{model}: {len(of_model)} calls, {inputs} tokens in, {outputs} out, {cost}")
    return f"Calls behind these verdicts: {'; '.join(said)}."


def endpoints_of(sections: Iterable[Any]) -> dict[str, Endpoint]:
    """Model -> endpoint, of settings of critics and judges; stand-ins have none."""
    found = [getattr(section, "endpoint", None) for section in sections]
    return {endpoint.model: endpoint for endpoint in found if endpoint is not None}


def _records(gallery: Gallery) -> Iterable[Mapping[str, Any]]:
    for row in gallery.critiques.values():
        yield from [row.record] if row.record is not None else []
        for answer in row.answers:
            yield from [*([answer.record] if answer.record is not None else []), *answer.judged]
    for judged in gallery.verdicts.values():
        yield from [*judged.records, *(record for answer in judged.answers for record in answer.records)]


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
