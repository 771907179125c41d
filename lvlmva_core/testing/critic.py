"""Hold a stand-in for a critic to account: what it writes, and that the judge of its prose reads it.

from lvlmva_core.testing.critic import CriticTests

class TestMine(CriticTests):
    def criticise(self, case):
        return criticise_by_mine(case.picture, case.segments)
"""

import re
from dataclasses import replace

import numpy as np

from lvlmva_core.lvlm.cases import Case
from lvlmva_core.lvlm.offline import CRITICS, judge_by_rules
from lvlmva_core.lvlm.settings import DetectorCritic, StandInCritic
from lvlmva_core.regions import NO_REGION, regions_present
from lvlmva_core.render import COLOUR_NAMES
from lvlmva_core.testing.checks import global_generators_left_alone


class CriticTests:
    """What a stand-in owes its judge. Subclass it, set `name`, and let pytest collect it.

    numbering_matters: whether a verdict may depend on the number of its region, as drawn errors do.
    """

    name: str
    numbering_matters = False
    channels = 1
    size = 28

    def settings(self) -> StandInCritic | DetectorCritic:
        """The section `critique` of params."""
        return StandInCritic(critic=self.name, prompts="decoy_digits")

    def criticise(self, case: Case) -> str:
        """The critique of a sample, by the stand-in under test."""
        return CRITICS[self.name].criticise(case, self.settings())

    def verdicts(self, case: Case, critique: str) -> dict[int, str]:
        """What the judge reads in it, region -> "yes" | "no"; raises ValueError where it cannot."""
        return judge_by_rules(critique, regions_present(case.segments))

    def cases(self) -> list[Case]:
        """A stroke in the middle and a square in a corner: four regions, one region, and regions with gaps between."""
        rng = np.random.default_rng(0)
        size = self.size
        picture = np.zeros((self.channels, size, size), dtype=np.uint8)
        stroke, square = np.zeros((2, size, size), dtype=bool)
        stroke[size // 4 : -size // 4, size // 2 - 1 : size // 2 + 2] = True
        square[:4, :4] = True
        picture[:, stroke], picture[:, square] = 220, 130
        quarters = (np.arange(size)[:, None] >= size // 2) * 2 + (np.arange(size)[None] >= size // 2)
        four = quarters.astype(np.uint8)
        gaps = np.where(four % 2 == 0, four + 1, NO_REGION).astype(np.uint8)
        attribution = rng.normal(size=(size, size)).astype(np.float32)
        return [
            Case(f"patient-{n}", "7", picture, segments, "ok", attribution, square, stroke)
            for n, segments in enumerate((four, np.zeros_like(four), gaps))
        ]

    def test_the_judge_reads_a_verdict_for_each_region(self) -> None:
        """One for each that is present, "yes" or "no"; for no other."""
        for case in self.cases():
            critique = self.criticise(case)
            assert isinstance(critique, str)
            found = self.verdicts(case, critique)
            assert sorted(found) == regions_present(case.segments)
            assert set(found.values()) <= {"yes", "no"}

    def test_prose_names_the_regions_that_are_there(self) -> None:
        """By their colours, and no other region's."""
        for case in self.cases():
            critique, present = self.criticise(case), regions_present(case.segments)
            for region, colour in enumerate(COLOUR_NAMES):
                named = re.search(rf"\b{re.escape(colour)}\b", critique) is not None
                assert named == (region in present), f"'{colour}' (region {region}) in: {critique}"

    def test_prose_holds_no_sample_id(self) -> None:
        """Ids hold patients' numbers, and a critique may be sent to a judge elsewhere."""
        for case in self.cases():
            assert case.sample not in self.criticise(case)

    def test_the_same_again(self) -> None:
        """Same sample, same words; nothing is drawn from the global generators."""
        for case in self.cases():
            first = self.criticise(case)
            with global_generators_left_alone():
                assert self.criticise(case) == first

    def test_samples_are_independent(self) -> None:
        """What was asked before changes nothing."""
        cases = self.cases()
        in_order = [self.criticise(case) for case in cases]
        assert [self.criticise(case) for case in reversed(cases)] == in_order[::-1]

    def test_inputs_are_left_alone(self) -> None:
        """Nothing is written to pictures, regions, masks or maps."""
        for case, twin in zip(self.cases(), self.cases(), strict=True):
            self.criticise(case)
            for name in ("picture", "segments", "spurious_mask", "object_mask", "attribution"):
                assert np.array_equal(getattr(case, name), getattr(twin, name)), f"{name} was written to"

    def test_the_number_of_a_region_decides_nothing(self) -> None:
        """A region under another number and colour gets the same verdict."""
        if self.numbering_matters:
            return
        for case in self.cases():
            present = regions_present(case.segments)
            other = dict(zip(present, [5 - region for region in present], strict=True))
            renumbered = case.segments.copy()
            for region, number in other.items():
                renumbered[case.segments == region] = number
            changed = replace(case, segments=renumbered)
            first = self.verdicts(case, self.criticise(case))
            found = self.verdicts(changed, self.criticise(changed))
            assert found == {other[region]: verdict for region, verdict in first.items()}
