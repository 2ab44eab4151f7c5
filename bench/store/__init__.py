"""The run folder: append-only records on disk, readable after a kill at any instant.

Layout of ``results/runs/<experiment>/<cell_id>/run-<n>-<utc>/``::

    manifest.json         written first as "running", replaced atomically at the end with counts and sha256 of each file
    requests.jsonl        one RequestRecord a line, appended as requests complete
    chunks.arrow          Arrow IPC stream of ChunkRecord (streaming loads)
    engine_steps.arrow    Arrow IPC stream of EngineStep
    engine_metrics.arrow  Arrow IPC stream of EngineMetric (scraped /metrics)
    telemetry.arrow       Arrow IPC stream of GpuSample (written by the sampler's own process)
    engine.log            the engine's output
    summary.json          derived: safe to delete

A torn last line or batch is dropped with a warning, never refused: at most one flush interval is lost.
"""

from bench.store.arrow import ArrowAppender, read_arrow, read_records, records_to_columns, schema_of, warm_up
from bench.store.files import (
    CHUNKS,
    DATA_FILES,
    ENGINE_LOG,
    FINAL_STATUSES,
    FLUSH_INTERVAL_S,
    MANIFEST,
    METRICS,
    REQUESTS,
    SCHEMA_VERSION,
    STEPS,
    SUMMARY,
    TELEMETRY,
    file_facts,
    process_start_s,
    run_folder_name,
    utc_now_text,
    write_json_atomically,
)
from bench.store.reader import RunReader, list_cells, list_runs
from bench.store.writer import RunWriter

__all__ = [
    "CHUNKS",
    "DATA_FILES",
    "ENGINE_LOG",
    "FINAL_STATUSES",
    "FLUSH_INTERVAL_S",
    "MANIFEST",
    "METRICS",
    "REQUESTS",
    "SCHEMA_VERSION",
    "STEPS",
    "SUMMARY",
    "TELEMETRY",
    "ArrowAppender",
    "RunReader",
    "RunWriter",
    "file_facts",
    "list_cells",
    "list_runs",
    "process_start_s",
    "read_arrow",
    "read_records",
    "records_to_columns",
    "run_folder_name",
    "schema_of",
    "utc_now_text",
    "warm_up",
    "write_json_atomically",
]
