//! `export`: a checkpoint as a Hugging Face folder.

use crate::error::{Result, TrainError};
use crate::open_model::Source;
use std::path::Path;
use tangelo_configs::job::ExportType;
use tangelo_configs::requests::ExportRequest;
use tangelo_core::DType;
use tangelo_formats::tokenizer::TokenizerAssets;
use tangelo_formats::writer::{HfWriter, MAX_SHARD_BYTES};

/// The verb.
pub fn run(request: &ExportRequest) -> Result<()> {
    let source = Source::open(&request.run, request.step)?;
    let tokenizer = match source.tokenizer(&request.run) {
        Ok(assets) => Some(assets),
        Err(e) => {
            eprintln!("warning: exported without a tokenizer: {e}");
            None
        }
    };
    write(&source, tokenizer.as_ref(), dtype_of(request.dtype), &request.output)?;
    println!("{}", request.output.display());
    Ok(())
}

/// The element type of an export.
pub fn dtype_of(dtype: ExportType) -> DType {
    match dtype {
        ExportType::Float32 => DType::F32,
        ExportType::Float16 => DType::F16,
        ExportType::Bfloat16 => DType::BF16,
    }
}

/// Writes the folder, a few rows at a time.
pub fn write(source: &Source, tokenizer: Option<&TokenizerAssets>, dtype: DType, output: &Path) -> Result<()> {
    let failed = |e: tangelo_formats::FormatError| TrainError::Data(e.to_string());
    let mut writer = HfWriter::create(output, source.spec(), dtype, MAX_SHARD_BYTES, tokenizer).map_err(failed)?;
    for meta in source.spec().parameters(dtype) {
        let mut rows = |rows, out: &mut [f32]| Ok(source.tensors().read_f32(&meta, rows, out)?);
        writer.write_f32(&meta.name, &mut rows).map_err(failed)?;
    }
    writer.finish().map_err(failed)
}
