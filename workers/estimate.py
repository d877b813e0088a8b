"""`python -m workers.estimate`: what a training takes, asked by the service, which loads no torch itself.

A question as JSON on standard input, the answer as JSON on standard output. A model that cannot be
built is an answer too, `{"problem": "why"}`; anything else ends with a traceback.
"""

import json
import sys
from dataclasses import asdict
from typing import Any

from cim_core.errors import ConfigError, ModelError
from cim_core.estimate.cost import Cost, pretrain_cost, tokenizer_cost
from service.contracts.estimates import Question


def main() -> None:
    """Answer one question."""
    question = Question.model_validate_json(sys.stdin.read())
    sys.stdout.write(json.dumps(answer(question)))


def answer(question: Question) -> dict[str, Any]:
    """The cost as a document, or the reason why there is none."""
    try:
        return asdict(_cost(question))
    except (ModelError, ConfigError) as error:
        return {"problem": str(error)}


def _cost(question: Question) -> Cost:
    training, workers, on_gpu = question.training, question.workers, question.on_gpu
    if question.pretrain is not None:
        return pretrain_cost(
            question.pretrain,
            training,
            tokenizer=question.tokenizer,
            num_workers=workers,
            on_gpu=on_gpu,
        )
    assert question.tokenizer is not None, "either a model or a tokenizer is trained"
    return tokenizer_cost(question.tokenizer, training, num_workers=workers, on_gpu=on_gpu)


if __name__ == "__main__":
    main()
