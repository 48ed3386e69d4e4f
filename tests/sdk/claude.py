"""The official Anthropic client, unmodified, on the same cluster."""

import anthropic
from common import ARGS, HELLO, claude, raises

TOOL = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}


def wishes(temperature=0, **more):
    """This version of the client has no parameter for the temperature, and sends what it is given beside its own."""
    return {"model": ARGS.model, "messages": HELLO, "max_tokens": 16, "extra_body": {"temperature": temperature}} | more


def a_message_answers():
    answer = claude().messages.create(system="You answer in one word.", **wishes())
    assert answer.type == "message" and answer.role == "assistant" and answer.model == ARGS.model, answer
    assert answer.content[0].type == "text" and answer.content[0].text.strip(), answer
    assert answer.stop_reason in ("end_turn", "max_tokens"), answer
    assert answer.usage.input_tokens > 0 and 0 < answer.usage.output_tokens <= 16, answer.usage


def a_streamed_message_says_the_same():
    whole = claude().messages.create(**wishes())
    with claude().messages.stream(**wishes()) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text, (text, whole)
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens, (final, whole)


def raw_events_come_in_their_order():
    kinds = [event.type for event in claude().messages.create(stream=True, **wishes())]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"], kinds
    assert kinds.index("content_block_start") < kinds.index("content_block_delta") < kinds.index("content_block_stop"), kinds


def a_stop_sequence_is_named():
    text = claude().messages.create(**wishes(max_tokens=30)).content[0].text
    stop = text.split()[-1]
    answer = claude().messages.create(stop_sequences=[stop], **wishes(max_tokens=30))
    assert answer.stop_reason == "stop_sequence" and answer.stop_sequence == stop, answer
    assert stop not in "".join(block.text for block in answer.content), answer


def a_forced_tool_is_used_with_its_input():
    ask = wishes(max_tokens=100, tools=[TOOL], tool_choice={"type": "tool", "name": "get_weather"})
    answer = claude().messages.create(**ask)
    block = next(block for block in answer.content if block.type == "tool_use")
    assert answer.stop_reason == "tool_use" and block.name == "get_weather" and block.id, answer
    assert isinstance(block.input["city"], str) and 1 <= block.input["days"] <= 7, block
    with claude().messages.stream(**ask) as stream:
        streamed = next(block for block in stream.get_final_message().content if block.type == "tool_use")
    assert streamed.input == block.input, (streamed, block)


def a_conversation_goes_on_after_a_tool():
    messages = HELLO + [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris", "days": 2}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "Sunny."}]},
    ]
    answer = claude().messages.create(tools=[TOOL], **wishes(messages=messages))
    assert answer.content, answer


def errors_have_the_types_of_anthropic():
    raises(anthropic.AuthenticationError, 401, lambda: claude(key="wrong").messages.create(**wishes()))
    raises(anthropic.NotFoundError, 404, lambda: claude().messages.create(**wishes(model="gpt-17")))
    error = raises(anthropic.BadRequestError, 400, lambda: claude().messages.create(**wishes(temperature=9.5)))
    assert error.body["type"] == "error" and error.body["error"]["type"] == "invalid_request_error", error.body


CHECKS = [
    a_message_answers,
    a_streamed_message_says_the_same,
    raw_events_come_in_their_order,
    a_stop_sequence_is_named,
    a_forced_tool_is_used_with_its_input,
    a_conversation_goes_on_after_a_tool,
    errors_have_the_types_of_anthropic,
]
