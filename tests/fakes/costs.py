"""Costs without networks: one answer for every question, which is kept."""

from dataclasses import dataclass, field

from service.contracts.estimates import Cost, MemoryCost, Question
from service.jobs.costs import NoCostError

COST = Cost(
    parameters={"enhancer": 21_665_664, "generator": 6_784_640, "head": 295_680, "tokenizer": 97_616_006},
    macs_per_image={
        "enhancer": 4_597_920_768,
        "generator": 1_921_155_072,
        "head": 57_802_752,
        "tokenizer_encode": 26_056_196_096,
        "tokenizer_decode": 29_274_177_536,
    },
    macs_per_training_image=75_061_009_408,
    memory_per_worker=MemoryCost(
        model_bytes=115_000_000,
        tokenizer_bytes=390_464_024,
        gradients_bytes=115_000_000,
        optimizer_bytes=230_000_000,
        activations_bytes=6_761_352_000,
        snapshot_bytes=345_000_000,
        peak_bytes=7_493_625_000,
    ),
)


@dataclass
class FakeCosts:
    """Satisfies `Costs`."""

    answer: Cost | NoCostError = COST
    questions: list[Question] = field(default_factory=list)

    async def cost(self, question: Question, *, limit_s: float) -> Cost:
        """The answer, raised where it is an error."""
        assert limit_s > 0
        self.questions.append(question)
        if isinstance(self.answer, NoCostError):
            raise self.answer
        return self.answer
