"""What a user's program does with the official OpenAI and Anthropic clients, and what it must see. Ends with 1 when anything is not so.

Each check is one function whose name says what holds; all run, and each prints one line.
"""

import ssl
import sys
import traceback

import anthropic
import basics
import claude
import openai
import other_apis
import typed

CHECKS = basics.CHECKS + typed.CHECKS + other_apis.CHECKS + claude.CHECKS


def main():
    versions = f"openai {openai.__version__}, anthropic {anthropic.__version__}, Python {sys.version.split()[0]}"
    print(f"{versions}, {ssl.OPENSSL_VERSION}")
    failed = 0
    for check in CHECKS:
        try:
            check()
            print(f"ok    {check.__name__}")
        except Exception:  # noqa: BLE001 - each check must be told of, whatever it raised
            failed += 1
            print(f"FAIL  {check.__name__}\n{traceback.format_exc()}")
    sys.exit(1 if failed else 0)


main()
