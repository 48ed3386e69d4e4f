"""Responses and embeddings by the OpenAI client."""

import math

import openai
from common import ARGS, client, raises
from typed import ASK_ANIMAL, Animal


def wishes(**more):
    return {"model": ARGS.model, "input": "Name one colour.", "max_output_tokens": 16, "temperature": 0} | more


def a_response_answers():
    answer = client().responses.create(instructions="You answer in one word.", **wishes())
    assert answer.object == "response" and answer.status in ("completed", "incomplete"), answer
    assert answer.output_text.strip(), answer
    assert answer.usage.input_tokens > 0 and 0 < answer.usage.output_tokens <= 16, answer.usage


def a_streamed_response_says_the_same():
    whole = client().responses.create(**wishes())
    events = list(client().responses.create(stream=True, **wishes()))
    assert events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete"), events
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers)), numbers
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text, (text, whole)


def a_gathered_response_is_whole():
    # the helper knows answers that come to their end, so to a schema
    with client().responses.stream(text_format=Animal, **wishes(input=ASK_ANIMAL, max_output_tokens=120)) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.output_text.delta" in kinds and isinstance(final.output_parsed, Animal), (kinds, final)


def a_response_is_held_to_a_schema():
    answer = client().responses.parse(text_format=Animal, **wishes(input=ASK_ANIMAL, max_output_tokens=120))
    assert isinstance(answer.output_parsed, Animal), answer


def a_bad_response_request_is_400():
    error = raises(openai.BadRequestError, 400, lambda: client().responses.create(**wishes(temperature=9.5)))
    assert error.param == "temperature", error.param


def embeddings_have_one_direction_for_one_text():
    # the client asks for base64 unless told otherwise, and decodes it
    packed = client().embeddings.create(model=ARGS.model, input=["a cat", "a cat", "tax law"])
    plain = client().embeddings.create(model=ARGS.model, input="a cat", encoding_format="float")
    first, second, other = [item.embedding for item in packed.data]
    assert abs(math.hypot(*first) - 1) < 1e-3, math.hypot(*first)
    assert first == second != other, "one text, one vector"
    assert max(abs(a - b) for a, b in zip(first, plain.data[0].embedding)) < 1e-6
    assert packed.usage.prompt_tokens > 0, packed.usage


def an_embedding_of_nothing_is_400():
    error = raises(openai.BadRequestError, 400, lambda: client().embeddings.create(model=ARGS.model, input=[]))
    assert error.param == "input", error.param


CHECKS = [
    a_response_answers,
    a_streamed_response_says_the_same,
    a_gathered_response_is_whole,
    a_response_is_held_to_a_schema,
    a_bad_response_request_is_400,
    embeddings_have_one_direction_for_one_text,
    an_embedding_of_nothing_is_400,
]
