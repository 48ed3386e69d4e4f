"""What the client's typed helpers rest on: answers held to a schema, calls of tools, log-probabilities, streams that gather themselves."""

import enum
import json
import math

import openai
import pydantic
from common import ARGS, HELLO, chat, client


class Size(enum.Enum):
    SMALL = "small"
    LARGE = "large"


class Animal(pydantic.BaseModel):
    """Bounded, because a small model left alone may write for ever."""

    name: str = pydantic.Field(max_length=12)
    legs: int = pydantic.Field(ge=0, le=8)
    size: Size
    colours: list[Size] = pydantic.Field(max_length=2)


class GetWeather(pydantic.BaseModel):
    """Get the weather of a city."""

    city: str = pydantic.Field(max_length=20)
    days: int = pydantic.Field(ge=1, le=7)


ASK_ANIMAL = [{"role": "user", "content": "Describe an animal as JSON."}]
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Paris for the next 2 days?"}]
NAMED = {"type": "function", "function": {"name": "GetWeather"}}


def wishes(messages, **more):
    return {"model": ARGS.model, "messages": messages, "max_tokens": 120, "temperature": 0} | more


def parse_gives_an_object_of_the_schema():
    answer = client().chat.completions.parse(response_format=Animal, **wishes(ASK_ANIMAL))
    message = answer.choices[0].message
    assert isinstance(message.parsed, Animal), message
    assert answer.choices[0].finish_reason == "stop", answer


def parse_holds_seeded_answers_too():
    for seed in range(3):
        answer = client().chat.completions.parse(response_format=Animal, **wishes(ASK_ANIMAL, temperature=1.3, seed=seed))
        assert isinstance(answer.choices[0].message.parsed, Animal), (seed, answer)


def a_streamed_schema_gathers_to_the_same_object():
    whole = client().chat.completions.parse(response_format=Animal, **wishes(ASK_ANIMAL)).choices[0].message
    with client().chat.completions.stream(response_format=Animal, **wishes(ASK_ANIMAL)) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    assert final.parsed == whole.parsed and final.content == whole.content, (final, whole)


def json_object_is_json():
    answer = chat(messages=ASK_ANIMAL, response_format={"type": "json_object"}, max_tokens=200, extra_body={"repetition_penalty": 1.2})
    choice = answer.choices[0]
    assert choice.message.content.lstrip().startswith("{"), choice
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict), choice


def a_named_tool_is_called_with_its_arguments():
    tools = [openai.pydantic_function_tool(GetWeather)]
    answer = client().chat.completions.parse(tools=tools, tool_choice=NAMED, **wishes(ASK_WEATHER))
    calls = answer.choices[0].message.tool_calls
    assert calls and calls[0].function.name == "GetWeather" and calls[0].id, answer
    assert isinstance(calls[0].function.parsed_arguments, GetWeather), calls
    assert answer.choices[0].finish_reason in ("stop", "tool_calls"), answer


def a_required_tool_is_one_of_those_given():
    tools = [openai.pydantic_function_tool(GetWeather), openai.pydantic_function_tool(Animal, name="show_animal")]
    answer = client().chat.completions.parse(tools=tools, tool_choice="required", **wishes(ASK_WEATHER))
    calls = answer.choices[0].message.tool_calls
    assert calls and isinstance(calls[0].function.parsed_arguments, (GetWeather, Animal)), answer
    assert answer.choices[0].finish_reason == "tool_calls", answer


def a_streamed_call_gathers_to_the_same_call():
    tools = [openai.pydantic_function_tool(GetWeather)]
    ask = wishes(ASK_WEATHER, tools=tools, tool_choice=NAMED)
    whole = client().chat.completions.parse(**ask).choices[0].message.tool_calls[0].function
    with client().chat.completions.stream(**ask) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message.tool_calls[0].function
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds, kinds
    assert (final.name, final.arguments) == (whole.name, whole.arguments), (final, whole)


def tools_may_be_left_alone():
    tools = [openai.pydantic_function_tool(GetWeather)]
    for choice in ("auto", "none"):
        message = chat(tools=tools, tool_choice=choice).choices[0].message
        assert message.content or message.tool_calls, (choice, message)
        assert choice == "auto" or not message.tool_calls, message


def a_conversation_goes_on_after_a_call():
    call = {"id": "call_1", "type": "function", "function": {"name": "GetWeather", "arguments": '{"city": "Paris", "days": 2}'}}
    messages = ASK_WEATHER + [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny, 21 degrees."},
    ]
    answer = chat(messages=messages, tools=[openai.pydantic_function_tool(GetWeather)])
    assert answer.choices[0].message.content, answer


def logprobs_tell_each_token():
    answer = chat(logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    text = b"".join(bytes(token.bytes or []) for token in content).decode()
    assert text == answer.choices[0].message.content, (text, answer)
    for token in content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0, token
        # greedy, so what was chosen is the likeliest
        assert math.isclose(token.top_logprobs[0].logprob, token.logprob) and token.top_logprobs[0].token == token.token, token


def streamed_logprobs_are_the_same():
    whole = chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed = []
    for chunk in chat(logprobs=True, top_logprobs=2, stream=True):
        for choice in chunk.choices:
            streamed += (choice.logprobs and choice.logprobs.content) or []
    assert streamed == whole, (streamed, whole)


def completions_echo_and_tell_logprobs():
    ask = {"model": ARGS.model, "prompt": "The sky is blue", "max_tokens": 4, "temperature": 0, "logprobs": 2}
    plain = client().completions.create(**ask).choices[0]
    echoed = client().completions.create(echo=True, **ask).choices[0]
    assert echoed.text == "The sky is blue" + plain.text, (echoed, plain)
    assert "".join(echoed.logprobs.tokens) == echoed.text, echoed
    assert echoed.logprobs.token_logprobs[0] is None and echoed.logprobs.text_offset[0] == 0, echoed
    assert all(logprob <= 0 for logprob in echoed.logprobs.token_logprobs[1:]), echoed
    assert echoed.logprobs.token_logprobs[-len(plain.logprobs.tokens):] == plain.logprobs.token_logprobs, (echoed, plain)


def penalties_stop_a_repetition():
    def complete(**penalties):
        ask = {"model": ARGS.model, "prompt": "sea, " * 12, "max_tokens": 40, "temperature": 0}
        return client().completions.create(**ask, **penalties).choices[0].text
    # left alone, the model goes on with the only word it has seen
    plain, penalized = complete(), complete(presence_penalty=2, frequency_penalty=2)
    assert plain.count("sea") > 10 and penalized.count("sea") < plain.count("sea"), (plain, penalized)


def a_bias_bans_tokens():
    plain = chat(max_tokens=40).choices[0].message.content
    # no even token: whatever the answer was, it had some
    banned = chat(max_tokens=40, logit_bias={str(token): -100 for token in range(2, 600, 2)}).choices[0].message.content
    assert banned != plain, banned


def vllm_guides_hold():
    colours = ["red", "green", "blue"]
    answer = chat(messages=HELLO, extra_body={"guided_choice": colours}).choices[0]
    assert answer.message.content in colours and answer.finish_reason == "stop", answer
    answer = chat(messages=HELLO, extra_body={"guided_regex": "[a-c]{3}-[0-9]{2}"}).choices[0]
    letters, digits = answer.message.content.split("-")
    assert len(letters) == 3 and digits.isdigit(), answer


CHECKS = [
    parse_gives_an_object_of_the_schema,
    parse_holds_seeded_answers_too,
    a_streamed_schema_gathers_to_the_same_object,
    json_object_is_json,
    a_named_tool_is_called_with_its_arguments,
    a_required_tool_is_one_of_those_given,
    a_streamed_call_gathers_to_the_same_call,
    tools_may_be_left_alone,
    a_conversation_goes_on_after_a_call,
    logprobs_tell_each_token,
    streamed_logprobs_are_the_same,
    completions_echo_and_tell_logprobs,
    penalties_stop_a_repetition,
    a_bias_bans_tokens,
    vllm_guides_hold,
]
