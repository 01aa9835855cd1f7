"""The tables of the database as a list of migrations; append only."""

from __future__ import annotations

#: Forward migrations: entry n, from 0, upgrades version n to n + 1. Never edit a released one.
MIGRATIONS = [
    """
    CREATE TABLE models (
        fingerprint VARCHAR PRIMARY KEY, source VARCHAR, revision VARCHAR, architecture VARCHAR,
        layers INTEGER, context INTEGER, parameters BIGINT, linear_parameters BIGINT,
        file_bytes BIGINT, other_bytes BIGINT, tied_embeddings BOOLEAN, left_out VARCHAR[],
        config JSON, created TIMESTAMP
    );
    CREATE TABLE matrices (
        fingerprint VARCHAR, position INTEGER, name VARCHAR, layer INTEGER, type VARCHAR,
        out_features INTEGER, in_features INTEGER, expert INTEGER
    );
    CREATE TABLE profiles (
        id VARCHAR PRIMARY KEY, fingerprint VARCHAR, settings JSON, provenance JSON,
        created TIMESTAMP
    );
    CREATE TABLE scores (
        profile VARCHAR, module VARCHAR, layer INTEGER, type VARCHAR, metric VARCHAR,
        config VARCHAR, part VARCHAR, value DOUBLE
    );
    CREATE TABLE plans (
        id VARCHAR PRIMARY KEY, name VARCHAR, fingerprint VARCHAR, profile VARCHAR,
        method VARCHAR, bits_per_param DOUBLE, nominal_bytes DOUBLE, planned_bytes BIGINT,
        model_bytes BIGINT, content JSON, created TIMESTAMP
    );
    CREATE TABLE runs (
        id VARCHAR PRIMARY KEY, plan VARCHAR, fingerprint VARCHAR, method VARCHAR,
        quantizer VARCHAR, measured_bytes BIGINT, model_bytes BIGINT, quantize_seconds DOUBLE,
        saved_to VARCHAR, device VARCHAR, machine VARCHAR, dtype VARCHAR, seed INTEGER,
        versions JSON, created TIMESTAMP
    );
    CREATE TABLE evaluations (
        id VARCHAR PRIMARY KEY, run VARCHAR, fingerprint VARCHAR, corpus VARCHAR,
        corpus_sha256 VARCHAR, corpus_source VARCHAR, truncated BOOLEAN, protocol VARCHAR,
        tokens BIGINT, perplexity DOUBLE, kl DOUBLE, top1 DOUBLE, tokens_per_second DOUBLE,
        peak_bytes BIGINT, nll DOUBLE[], counts BIGINT[], provenance JSON, created TIMESTAMP
    );
    """,
    # Distinguishes published figures from measured ones.
    """
    ALTER TABLE models ADD COLUMN origin VARCHAR DEFAULT 'measured';
    ALTER TABLE profiles ADD COLUMN origin VARCHAR DEFAULT 'measured';
    ALTER TABLE runs ADD COLUMN origin VARCHAR DEFAULT 'measured';
    """,
    # The user's stars and notes; deleted runs are left out everywhere until restored.
    """
    ALTER TABLE runs ADD COLUMN starred BOOLEAN DEFAULT false;
    ALTER TABLE runs ADD COLUMN note VARCHAR DEFAULT '';
    ALTER TABLE runs ADD COLUMN deleted TIMESTAMP;
    """,
    # Data that high-impact ratios are planned from. ``profile`` is the id of the profile they
    # belong to, whether or not the profile's other metrics were measured.
    """
    CREATE TABLE row_scores (
        profile VARCHAR, module VARCHAR, scores DOUBLE[], provenance JSON, created TIMESTAMP
    );
    CREATE TABLE interactions (
        profile VARCHAR, loss VARCHAR, low_bits INTEGER, high_bits INTEGER, group_size INTEGER,
        layer INTEGER, units VARCHAR[], ratios DOUBLE[], matrix DOUBLE[], provenance JSON,
        created TIMESTAMP
    );
    """,
    # The names that a model was requested by, and its tokenizer and code under each.
    """
    CREATE TABLE model_names (
        source VARCHAR, revision VARCHAR, fingerprint VARCHAR, tokenizer VARCHAR, code VARCHAR,
        seen TIMESTAMP
    );
    INSERT INTO model_names
        SELECT source, revision, fingerprint, '', '', created FROM models
        WHERE origin = 'measured';
    ALTER TABLE models ADD COLUMN notes VARCHAR[];
    """,
    # Pairs each evaluation of a run with a full-precision one. Existing evaluations are paired with
    # one of the same provenance, by which they used to be distinguished, or else, marked as
    # inferred, with the latest earlier one with the same device type and dtype.
    """
    ALTER TABLE evaluations ADD COLUMN full_precision VARCHAR;
    ALTER TABLE evaluations ADD COLUMN pairing VARCHAR;
    ALTER TABLE evaluations ADD COLUMN working_bytes BIGINT;
    ALTER TABLE evaluations ADD COLUMN seconds JSON;
    UPDATE evaluations SET full_precision = found.pair, pairing = found.how
    FROM (
        SELECT e.id, first(f.id ORDER BY f.rank, f.created DESC) AS pair,
               first(f.how ORDER BY f.rank, f.created DESC) AS how
        FROM evaluations e, LATERAL (
            SELECT full_.id, full_.created,
                   CASE WHEN e.provenance ->> '$.origin' = 'published' THEN 'published'
                        WHEN CAST(full_.provenance AS VARCHAR) = CAST(e.provenance AS VARCHAR)
                        THEN 'measured' ELSE 'inferred' END AS how,
                   CASE how WHEN 'inferred' THEN 1 ELSE 0 END AS rank
            FROM evaluations full_
            WHERE full_.run IS NULL AND full_.fingerprint = e.fingerprint
              AND full_.corpus_sha256 = e.corpus_sha256 AND full_.protocol = e.protocol
              AND full_.tokens IS NOT DISTINCT FROM e.tokens
              AND full_.provenance ->> '$.dtype' = e.provenance ->> '$.dtype'
              AND split_part(full_.provenance ->> '$.device', ':', 1)
                  IS NOT DISTINCT FROM split_part(e.provenance ->> '$.device', ':', 1)
        ) f
        WHERE e.run IS NOT NULL AND (f.how <> 'inferred' OR f.created <= e.created)
        GROUP BY e.id
    ) found
    WHERE evaluations.id = found.id;
    """,
    # Which shipped measurements were imported, so that those the user has deleted since are not
    # imported again.
    """
    CREATE TABLE shipped (sha256 VARCHAR PRIMARY KEY, imported TIMESTAMP);
    """,
    # The distribution of the KL divergence over tokens; NULL for evaluations stored before.
    """
    ALTER TABLE evaluations ADD COLUMN divergence JSON;
    """,
    # The format that a run's weights were measured in: this project's own, or another tool's that
    # the model of another run was exported to.
    """
    ALTER TABLE runs ADD COLUMN format VARCHAR DEFAULT 'lsq';
    ALTER TABLE runs ADD COLUMN exported_from VARCHAR;
    """,
    # The steps of searches that refine a plan within a budget in nominal or planned bytes.
    # ``conditions`` describe the measurement; choices are indices of options; costs (matrices,
    # options) are in row-major order.
    """
    CREATE TABLE refinements (
        profile VARCHAR, request VARCHAR, conditions VARCHAR, nominal_bytes DOUBLE,
        planned_bytes DOUBLE, step INTEGER, choice INTEGER[],
        kl DOUBLE, expected DOUBLE, margin DOUBLE, cost DOUBLE[], options VARCHAR[],
        provenance JSON, created TIMESTAMP
    );
    """,
    # How much a model's perplexity and KL divergence change with the arithmetic alone, as shares.
    """
    CREATE TABLE noise_floors (
        id VARCHAR PRIMARY KEY, fingerprint VARCHAR, protocol VARCHAR, device VARCHAR,
        dtype VARCHAR, corpus VARCHAR, corpus_sha256 VARCHAR, tokens BIGINT, plan VARCHAR,
        perplexity DOUBLE, kl DOUBLE, conditions JSON, provenance JSON, created TIMESTAMP
    );
    """,
    # Scores of runs and full-precision models (without a run) on lm-eval's tasks.
    """
    CREATE TABLE task_results (
        id VARCHAR PRIMARY KEY, run VARCHAR, fingerprint VARCHAR, task VARCHAR, version VARCHAR,
        metric VARCHAR, value DOUBLE, stderr DOUBLE, higher_is_better BOOLEAN, fewshot INTEGER,
        max_documents BIGINT, documents BIGINT, dataset VARCHAR, provenance JSON,
        created TIMESTAMP
    );
    """,
    # The number of rounds of a search up to a step, and of those since that found nothing better;
    # each existing step was one round.
    """
    ALTER TABLE refinements ADD COLUMN rounds INTEGER;
    ALTER TABLE refinements ADD COLUMN failed INTEGER DEFAULT 0;
    UPDATE refinements SET rounds = step;
    """,
]
