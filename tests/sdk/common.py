"""What all checks share: arguments, clients, and the way to demand an error."""

import argparse
import ssl

import anthropic
import openai

HELLO = [{"role": "user", "content": "Name one colour."}]


def parse():
    parser = argparse.ArgumentParser()
    for name in ("base-url", "ca", "key", "model", "narrow", "ghost"):
        parser.add_argument(f"--{name}", required=True)
    return parser.parse_args()


ARGS = parse()


def transport(kind):
    tls = ssl.create_default_context(cafile=ARGS.ca)
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    return kind(verify=tls, trust_env=False, timeout=60)


def client(key=ARGS.key):
    http = transport(openai.DefaultHttpxClient)
    return openai.OpenAI(base_url=ARGS.base_url, api_key=key, http_client=http, max_retries=0)


def claude(key=ARGS.key):
    """The Anthropic client adds `/v1` itself, and shows its key as `x-api-key`."""
    http = transport(anthropic.DefaultHttpxClient)
    return anthropic.Anthropic(base_url=ARGS.base_url.removesuffix("/v1"), api_key=key, http_client=http, max_retries=0)


def chat(**changes):
    wishes = {"model": ARGS.model, "messages": HELLO, "max_tokens": 12, "temperature": 0} | changes
    return client().chat.completions.create(**wishes)


def raises(kind, status, call):
    """Calls, and returns the error that must come."""
    try:
        call()
    except kind as error:
        assert error.status_code == status, f"status {error.status_code}, wanted {status}"
        assert error.response.headers.get("x-request-id"), "no request id"
        return error
    raise AssertionError(f"no {kind.__name__}")
