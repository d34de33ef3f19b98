//! Every flavor has its published size; every preset resolves.

use crate::{FakeAssets, machine};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tangelo_configs::preset::{ALGORITHMS, PRESETS};
use tangelo_configs::resolve::{load, load_str, resolve};
use tangelo_configs::{ModelSpec, flavor, flavors};

fn files(folder: &str) -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    entries.filter_map(|name| name.to_str().unwrap().strip_suffix(".toml").map(str::to_owned)).collect()
}

#[test]
fn the_lists_name_every_file() {
    assert_eq!(files("flavors"), flavor::names().into_iter().map(str::to_owned).collect());
    assert_eq!(files("presets"), PRESETS.iter().map(|p| p.name.to_owned()).collect());
    assert_eq!(files("presets/algorithm"), ALGORITHMS.iter().map(|p| p.name.to_owned()).collect());
}

#[test]
fn flavors_have_their_published_sizes() {
    // As their model cards and weight files have them.
    let published = [
        ("smollm2-135m", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
    ];
    for (name, parameters) in published {
        let flavor = flavor::flavor(name).unwrap();
        assert_eq!(flavor.spec(0).unwrap().num_parameters(), parameters, "{name}");
        assert_eq!(flavor.num_parameters, parameters, "{name}");
    }
    // The rest are our own, without a vocabulary: what is left are the blocks and the final norm.
    for flavor in flavors().unwrap().iter().filter(|f| f.model.vocab_size.is_none()) {
        assert_eq!(flavor.spec(0).unwrap().num_parameters(), flavor.num_parameters, "{}", flavor.name);
    }
}

/// What each preset's folders would hold: the flavor's own model and a tokenizer that fills its vocabulary.
fn assets_for(preset: &str) -> FakeAssets {
    let config = load_str(preset, "preset", &[]).unwrap();
    let mut assets = FakeAssets::default();
    let Some(path) = &config.model.hf_assets_path else { return assets };
    let path = PathBuf::from("/job").join(path);
    let name = config.model.flavor.unwrap_or("smollm2-135m".into());
    let spec: ModelSpec = flavor::flavor(&name).unwrap().spec(0).unwrap();
    assets.tokenizers.insert(path.clone(), spec.vocab_size - 7);
    assets.models.insert(path, spec);
    assets
}

#[test]
fn presets_resolve_and_resolve_again_to_the_same_plan() {
    for preset in PRESETS {
        for world_size in [1, 2, 8] {
            let assets = assets_for(preset.toml);
            let config = load_str(preset.toml, preset.name, &[]).unwrap_or_else(|e| panic!("{}: {e}", preset.name));
            let plan =
                resolve(config, &machine(world_size), &assets).unwrap_or_else(|e| panic!("{}: {e}", preset.name));
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("config.toml");
            std::fs::write(&file, plan.to_toml().unwrap()).unwrap();
            let again = resolve(load(&file, &[]).unwrap(), &machine(world_size), &assets).unwrap();
            assert_eq!(plan, again, "{}", preset.name);
        }
    }
}

#[test]
fn every_published_flavor_has_a_preset() {
    for flavor in flavors().unwrap() {
        let used = |p: &tangelo_configs::preset::Preset| p.toml.contains(&format!("flavor = \"{}\"", flavor.name));
        assert!(PRESETS.iter().any(used), "{}", flavor.name);
    }
}
