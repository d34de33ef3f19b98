//! Arrow data pipeline: source, tokenise, pack, mix, load.
