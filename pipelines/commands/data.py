"""Commands about data: tokenize."""

from __future__ import annotations

from typing import Any

import click

from pipelines.commands.options import common
from pipelines.console import run_command


def render_tokens(result: dict[str, Any]) -> str:
    """What was made, for people."""
    left_out = result["empty_documents"] + result["malformed_documents"]
    notes = f", {left_out:,} left out" if left_out else ""
    return (
        f"{result['output']}: {result['tokens']:,} tokens ({result['dtype']}) of {result['documents']:,} documents{notes}, "
        f"{result['shards']:,} shard(s), {result['seconds']:.1f} s\ndigest {result['digest']}"
    )


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="URL...")
@click.option("--output", required=True, metavar="URL", help="Folder of the token files.")
@click.option("--tokenizer", default="bytes", show_default=True, metavar="T", help="bytes, or a tokenizer.json.")
@click.option("--end-of-document", metavar="TOKEN", help="Name or id of the token that ends a document.")
@click.option("--format", "format_", type=click.Choice(["auto", "txt", "jsonl", "parquet"]), default="auto")
@click.option("--text-field", default="text", show_default=True, help="JSON field or parquet column of the text.")
@click.option("--lines", is_flag=True, help="Each line of a text file is a document.")
@click.option("--skip-malformed", is_flag=True, help="Leave unreadable documents out instead of ending.")
@click.option("--shard-tokens", type=click.IntRange(min=1), help="Most tokens of a shard; default 134217728.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Local processes.")
@common
def tokenize(
    sources: tuple[str, ...],
    output: str,
    tokenizer: str,
    end_of_document: str | None,
    format_: Any,
    text_field: str,
    lines: bool,
    skip_malformed: bool,
    shard_tokens: int | None,
    workers: int,
    as_json: bool,
    debug: bool,
) -> int:
    """Turn text, JSON lines or parquet into flat token files, once."""

    def work() -> dict[str, Any]:
        from pipelines.tokenize import SHARD_TOKENS
        from pipelines.tokenize import tokenize as story
        from tasks.data.documents import DocumentOptions

        return story(
            sources,
            output,
            tokenizer=tokenizer,
            end_of_document=int(end_of_document) if end_of_document and end_of_document.isdigit() else end_of_document,
            options=DocumentOptions(
                format=format_,
                text_field=text_field,
                txt_documents="line" if lines else "file",
                malformed="skip" if skip_malformed else "refuse",
            ),
            shard_tokens=shard_tokens or SHARD_TOKENS,
            workers=workers,
        )

    return run_command(work, render_tokens, as_json=as_json, debug=debug)
