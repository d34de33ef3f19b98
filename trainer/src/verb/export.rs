//! `export`: a checkpoint as a Hugging Face folder.

use super::VerbProgress;
use super::generate::print_line;
use crate::error::{Result, TrainError};
use crate::open_model::Source;
use std::ops::Range;
use std::path::{Path, PathBuf, absolute};
use tangelo_configs::job::ExportType;
use tangelo_configs::requests::ExportRequest;
use tangelo_core::DType;
use tangelo_formats::tokenizer::TokenizerAssets;
use tangelo_formats::writer::{HfWriter, MAX_SHARD_BYTES};
use tangelo_observe::{files, stderr_line};

/// The verb.
pub fn run(request: &ExportRequest) -> Result<()> {
    let output = output(&request.run, request.output.as_deref())?;
    let mut progress = VerbProgress::new("exporting");
    progress.phase("reading the model");
    let source = Source::open(&request.run, request.step)?;
    let tokenizer = match source.tokenizer(&request.run) {
        Ok(assets) => Some(assets),
        Err(e) => {
            stderr_line(format!("warning: exported without a tokenizer: {e}"));
            None
        }
    };
    write(&source, tokenizer.as_ref(), dtype_of(request.dtype), &output, |done, total| {
        progress.update(done, total, || format!("{done} of {total} parameters"));
    })?;
    print_line(&output.display().to_string())
}

/// The folder to write: `asked`, or `export` in the run folder. Never inside a checkpoint, where nothing changes once it
/// is complete, and which its run deletes when newer ones are there.
fn output(run: &Path, asked: Option<&Path>) -> Result<PathBuf> {
    if !run.join("manifest.json").is_file() {
        return Ok(asked.map_or_else(|| run.join("export"), Path::to_owned));
    }
    let failed = |e: std::io::Error| TrainError::Data(format!("{}: {e}", run.display()));
    let checkpoint = run.canonicalize().map_err(failed)?;
    let Some(asked) = asked else { return beside(&checkpoint) };
    let wanted = absolute(asked).map_err(failed)?;
    if wanted.starts_with(&checkpoint) || wanted.starts_with(absolute(run).map_err(failed)?) {
        return Err(TrainError::Config(format!(
            "--output {} lies inside the checkpoint, which must not change and may be deleted by its run; choose \
             another folder",
            asked.display()
        )));
    }
    Ok(asked.to_owned())
}

/// `export` in the run folder that holds `checkpoint`.
fn beside(checkpoint: &Path) -> Result<PathBuf> {
    let run = checkpoint.ancestors().skip(1).find(|folder| folder.join(files::CONFIG).is_file());
    run.map(|run| run.join("export")).ok_or_else(|| {
        TrainError::Config(format!(
            "{} lies in no run folder (no folder above it has a {}): say with --output where to export to",
            checkpoint.display(),
            files::CONFIG
        ))
    })
}

/// The element type of an export.
pub fn dtype_of(dtype: ExportType) -> DType {
    match dtype {
        ExportType::Float32 => DType::F32,
        ExportType::Float16 => DType::F16,
        ExportType::Bfloat16 => DType::BF16,
    }
}

/// Writes the folder, a few rows at a time; `progress` is told the parameters written so far, and all there are.
pub fn write(
    source: &Source,
    tokenizer: Option<&TokenizerAssets>,
    dtype: DType,
    output: &Path,
    mut progress: impl FnMut(u64, u64),
) -> Result<()> {
    let failed = |e: tangelo_formats::FormatError| TrainError::Data(e.to_string());
    let mut writer = HfWriter::create(output, source.spec(), dtype, MAX_SHARD_BYTES, tokenizer).map_err(failed)?;
    let parameters = source.spec().parameters(dtype);
    let total = parameters.iter().map(|meta| meta.num_elements() as u64).sum();
    let mut done = 0;
    for meta in &parameters {
        let mut rows = |rows: Range<usize>, out: &mut [f32]| {
            source.tensors().read_f32(meta, rows, out)?;
            done += out.len() as u64;
            progress(done, total);
            Ok(())
        };
        writer.write_f32(&meta.name, &mut rows).map_err(failed)?;
    }
    writer.finish().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_lies_in_the_run_folder_and_nothing_lies_in_a_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().canonicalize().unwrap();
        let step = run.join("checkpoint/step-00000004");
        std::fs::create_dir_all(&step).unwrap();
        std::fs::write(step.join("manifest.json"), "{}").unwrap();
        let refused = |asked: Option<&Path>| output(&step, asked).unwrap_err().to_string();
        assert!(refused(None).contains("--output"));
        std::fs::write(run.join(files::CONFIG), "").unwrap();
        assert_eq!(output(&step, None).unwrap(), run.join("export"));
        assert_eq!(output(&run, None).unwrap(), run.join("export"));
        assert!(refused(Some(&step.join("hf"))).contains("inside the checkpoint"));
        assert_eq!(output(&step, Some(Path::new("hf"))).unwrap(), Path::new("hf"));
    }
}
