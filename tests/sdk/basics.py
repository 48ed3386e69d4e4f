"""Chat and completions as most programs use them, and the errors that they must tell apart."""

import threading

import openai
from common import ARGS, chat, client, raises


def models_are_listed():
    ids = [model.id for model in client().models.list()]
    assert ARGS.model in ids and ARGS.narrow in ids, ids


def a_chat_answers():
    answer = chat()
    assert answer.object == "chat.completion" and answer.model == ARGS.model, answer
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content.strip(), choice
    assert choice.finish_reason in ("stop", "length"), choice
    usage = answer.usage
    assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 12, usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage


def a_streamed_chat_says_the_same():
    whole = chat().choices[0].message.content
    chunks = list(chat(stream=True))
    assert len({chunk.id for chunk in chunks}) == 1, "the id changes"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole, ("".join(pieces), whole)
    assert len([piece for piece in pieces if piece]) > 1, "it came in one piece"
    assert chunks[-1].choices[0].finish_reason in ("stop", "length"), chunks[-1]
    assert all(chunk.usage is None for chunk in chunks), "usage was not asked for"


def usage_comes_with_a_stream_when_asked_for():
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    last = chunks[-1]
    assert last.choices == [] and last.usage.completion_tokens > 0, last
    assert last.usage == chat().usage, (last.usage, chat().usage)


def a_completion_answers_and_streams_the_same():
    wishes = {"model": ARGS.model, "prompt": "The sky is", "max_tokens": 8, "temperature": 0}
    whole = client().completions.create(**wishes)
    assert whole.object == "text_completion" and whole.choices[0].text, whole
    pieces = [chunk.choices[0].text for chunk in client().completions.create(stream=True, **wishes) if chunk.choices]
    assert "".join(pieces) == whole.choices[0].text, (pieces, whole)


def a_stop_string_stops_and_does_not_show():
    text = chat(max_tokens=30).choices[0].message.content
    stop = text.split()[-1]
    answer = chat(max_tokens=30, stop=[stop]).choices[0]
    assert stop not in answer.message.content, (stop, answer)
    assert answer.finish_reason == "stop", answer


def a_seed_gives_the_same_answer_again():
    texts = {chat(temperature=1.0, seed=7, max_tokens=20).choices[0].message.content for _ in range(3)}
    assert len(texts) == 1, texts


def two_choices_come_with_their_index():
    answer = chat(n=2, temperature=1.0, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1], answer


def a_wrong_key_is_401():
    error = raises(openai.AuthenticationError, 401, lambda: client(key="wrong").models.list())
    assert error.body["message"], error.body
    assert error.code == "invalid_api_key", error.code


def an_unknown_model_is_404():
    error = raises(openai.NotFoundError, 404, lambda: chat(model="gpt-17"))
    assert error.code == "model_not_found" and error.param == "model", (error.code, error.param)


def a_bad_value_is_400():
    error = raises(openai.BadRequestError, 400, lambda: chat(temperature=9.5))
    assert error.param == "temperature", error.param


def a_full_node_is_429():
    """The narrow node takes one and queues one: of four long answers asked for at once, some are refused, and the others are whole."""
    outcomes = []

    def ask():
        try:
            answer = chat(model=ARGS.narrow, max_tokens=200, extra_body={"ignore_eos": True})
            outcomes.append(answer.usage.completion_tokens)
        except openai.APIStatusError as error:
            outcomes.append(error)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(timeout=60)
    errors = [outcome for outcome in outcomes if not isinstance(outcome, int)]
    whole = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert len(outcomes) == 4 and 1 <= len(errors) <= 3, outcomes
    assert all(tokens == 200 for tokens in whole), outcomes
    for error in errors:
        assert isinstance(error, openai.RateLimitError) and error.status_code == 429, error
        assert error.response.headers.get("retry-after"), "no retry-after"


def no_healthy_node_is_503():
    error = raises(openai.InternalServerError, 503, lambda: chat(model=ARGS.ghost))
    assert error.response.headers.get("retry-after"), "no retry-after"


CHECKS = [
    models_are_listed,
    a_chat_answers,
    a_streamed_chat_says_the_same,
    usage_comes_with_a_stream_when_asked_for,
    a_completion_answers_and_streams_the_same,
    a_stop_string_stops_and_does_not_show,
    a_seed_gives_the_same_answer_again,
    two_choices_come_with_their_index,
    a_wrong_key_is_401,
    an_unknown_model_is_404,
    a_bad_value_is_400,
    a_full_node_is_429,
    no_healthy_node_is_503,
]
