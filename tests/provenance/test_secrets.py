"""No secret reaches a record, and what is not secret stays readable."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.provenance.secrets import (
    REMOVED,
    is_secret_name,
    redact_command_line,
    redact_environment,
    redact_text,
    shorten_home,
)

S = "Zx9SECRETq7"


@pytest.mark.parametrize(
    "name",
    [
        "--api-key",
        "--api_key",
        "--apikey",
        "apiKey",
        "API_KEY",
        "API_KEY_2",
        "OPENAI_API_KEY",
        "OPENAI_APIKEY",
        "X-Api-Key",
        "api-keys",
        "HF_TOKEN",
        "hfToken",
        "--token",
        "--hf-token",
        "access_token",
        "auth.token",
        "client_secret",
        "dbPassword",
        "--password",
        "PGPASSWORD",
        "passwd",
        "pwd",
        "Authorization",
        "Proxy-Authorization",
        "Cookie",
        "AWS_SECRET_ACCESS_KEY",
        "--ssh-key",
        "key",
        "sig",
        "api%5Fkey",
        "WANDB_API_KEY",
        "credentials",
        "private_key",
        "encryption-key",
        "bearer",
        "basic-auth",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "--max-tokens",
        "--num-tokens",
        "tokens",
        "tokenizer",
        "--tokenizer-mode",
        "--eos-token",
        "--stop-token",
        "per-token",
        "--first-token",
        "--max-num-batched-tokens",
        "tokens_per_s",
        "--api-key-file",
        "--api-key-env",
        "--no-auth",
        "--sort-key",
        "keys",
        "key_value",
        "author",
        "--model",
        "--kv-cache-dtype",
        "--monkey",
        "keyboard",
        "public-key",
        "secretary",
        "passes",
        "cookies_path",
        "--output-token",
        "-H",
    ],
)
def test_names_that_are_not(name: str) -> None:
    assert not is_secret_name(name)


COMMANDS = [
    ["--api-key", S],
    [f"--api-key={S}"],
    ["--api-key", f"--{S}"],
    ["--api-key=", S],
    ["--api-key", "=", S],
    ["--api-keys", f"a,{S}"],
    [f"--hf_token={S}"],
    [f"--config.auth.token={S}"],
    [f"https://user:{S}@host/v1?x=1"],
    [f"https://{S}@host"],
    [f"https://user:p@ss{S}@host/path"],
    [f"postgres://u:p@{S}@h/db"],
    [f"http://h/v1?api_key={S}&n=2"],
    [f"http://h/v1?n=2&token={S}#fragment"],
    [f"http://h/v1?X-Amz-Signature={S}"],
    [f"http://h/v1?api-key%3d{S}"],
    [f"api%5Fkey%3D{S}"],
    [f"wss://h/#access_token={S}"],
    ["-H", f"Authorization: Bearer {S}"],
    ["-H", f"authorization:bearer {S}"],
    [f"--header=Authorization: Bearer {S}"],
    ["--header", f"X-API-Key: {S}"],
    ["--header", f"api-key:{S}"],
    [f"Proxy-Authorization: Basic {S}=="],
    [f"Cookie: session={S}; other={S}2"],
    [f"Authorization=Bearer {S}"],
    [f'--headers={{"Authorization": "Bearer {S}"}}'],
    ["--extra-body", f'{{"api_key": "{S}", "max_tokens": 5}}'],
    ["--extra-body", f"{{'nested': {{'password': '{S}'}}}}"],
    [f'--hf-overrides={{"k": "token={S}"}}'],
    [f"OPENAI_API_KEY={S}"],
    [f"AWS_SECRET_ACCESS_KEY={S}/+x=="],
    ["env", f"HF_TOKEN={S}", "bench", "run"],
    [f"--env=HF_TOKEN={S}"],
    ["-e", f"A=1,SECRET={S},B=2"],
    ["bash", "-c", f"export HF_TOKEN='{S}'; bench run x"],
    ["bash", "-c", f'HF_TOKEN="{S}" bench load --api-key {S} http://h'],
    ["sh", "-c", f"bench load --api-key {S} http://h"],
    [f"sh -c 'bench load --api-key {S} http://h'"],
    ["--password", f"two words {S}"],
    [f"--password=two words {S}"],
    ["--token", S, f"http://h/{S}/path", f"name-{S}"],  # where it stands once, it is removed everywhere
    [f"http://h/{S}/path", "--token", S],
    [f"API_KEY: {S}"],
    [f"bearer {S}"],
    [f"http%3A%2F%2Fh%2F%3Fapi_key%3D{S}"],
    [f"..token={S}"],
    [f"PGPASSWORD={S}"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda w: " ".join(w))
def test_command_lines_without_their_secrets(words: list[str]) -> None:
    shown = redact_command_line(["bench", "load", *words, "--num-prompts", "10"], {})
    assert not any(S in word for word in shown)
    assert REMOVED in " ".join(shown)
    assert shown[:2] == ["bench", "load"] and shown[-2:] == ["--num-prompts", "10"]


@pytest.mark.parametrize(
    "token",
    [
        "sk-proj-abcdefgh12345678",
        "sk-ant-api03-abcdefgh",
        "hf_abcdefghijklmnop",
        "ghp_abcdefghijklmnopqrstuvwxyz",
        "github_pat_11ABCDEFGabcdefghijk",
        "glpat-abcdefghijklmnop",
        "nvapi-abcdefghijklmn",
        "AKIAABCDEFGHIJKLMNOP",
        "AIzaSyA-abcdefghijklmnopqrstuv",
        "xoxb-123456789-abcdef",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc_DEF-123",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_well_known_shapes_go_wherever_they_stand(token: str) -> None:
    for text in (token, f"x={token}", f"http://h/{token}/v1", f"note {token} end", f"[{token}]"):
        assert token not in redact_text(text)


INNOCENT = [
    "bench run configs/experiments/default-gpu.yaml --json",
    "bench load http://localhost:8000/v1/completions?stream=true --rate 10 --tokenizer meta-llama/Llama-3.1-8B",
    "--max-num-batched-tokens 8192 --tensor-parallel-size=8 --eos-token </s> --stop-token-ids 1,2",
    '--engine {"max_num_seqs": 256, "tokens": 5, "key_value": 3}',
    "--api-key-env OPENAI_API_KEY --api-key-file keys.txt",
    "--sweep batch=1,2,4 isl:osl=1024:128 12:30:00 git@github.com:owner/repo.git",
    "C:\\x ratio=0.5 sk-8 hf_x task-force risk-averse",
]


@pytest.mark.parametrize("line", INNOCENT)
def test_what_is_not_secret_stays(line: str) -> None:
    assert redact_command_line(line.split(" "), {}) == line.split(" ")
    assert redact_text(line) == line


def test_values_of_secret_variables_go_from_the_command_line() -> None:
    environment = {"OPENAI_API_KEY": "plainlooking1", "PATH": "/usr/bin:plainlooking2", "PIN_TOKEN": "12"}
    words = ["x", "--note=plainlooking1", "plainlooking2", "n=12"]
    assert redact_command_line(words, environment) == ["x", f"--note={REMOVED}", "plainlooking2", "n=12"]


def test_environment() -> None:
    environment = {
        "VLLM_API_KEY": "abc12345",
        "VLLM_USE_V1": "1",
        "VLLM_PROXY": "http://u:pw@proxy",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "OTHER": "x",
    }
    assert redact_environment(environment, ("VLLM_", "CUDA_")) == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "VLLM_API_KEY": REMOVED,
        "VLLM_PROXY": f"http://{REMOVED}@proxy",
        "VLLM_USE_V1": "1",
    }


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("/home/ann/x.yaml", "~/x.yaml"),
        ("/home/ann", "~"),
        ("--out=/home/ann/r", "--out=~/r"),
        ("/home/anna/x", "/home/anna/x"),
        ("/mnt/home/ann/x", "/mnt/home/ann/x"),
        ("/home/ann:/home/ann/b", "~:~/b"),
    ],
)
def test_home_folder(text: str, short: str) -> None:
    assert shorten_home(text, "/home/ann") == short


def test_home_of_a_user_without_one() -> None:
    assert shorten_home("/x/y", "/") == "/x/y"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=6), st.text("abcdefghijkXYZ0123456789", min_size=8, max_size=20))
def test_any_command_line_around_a_secret(words: list[str], secret: str) -> None:
    secret = f"Q{secret}Q"
    shown = redact_command_line([*words, f"--api-key={secret}", *words, "--token", secret], {})
    assert len(shown) == 2 * len(words) + 3
    assert not any(secret in word for word in shown)


@pytest.mark.parametrize(
    "long", ["a" * 200_000, "a=" * 100_000, "-" * 200_000, "://" * 60_000, "'" * 100_000, "a:" * 90_000]
)
def test_long_words_take_no_quadratic_time(long: str) -> None:
    start = time.process_time()
    redact_command_line(["x", long], {})
    assert time.process_time() - start < 20
