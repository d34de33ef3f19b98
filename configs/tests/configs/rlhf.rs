//! `[reward]` and `[prompts]`: what is read, what is refused.

use expect_test::{Expect, expect};
use tangelo_configs::prompts::{Overlong, PromptGenerator};
use tangelo_configs::reward::{NumericMethod, OnError, RewardFunction};
use tangelo_configs::{Prompts, Reward};

fn reward(text: &str) -> Reward {
    toml::from_str(text).unwrap()
}

fn bad_reward(text: &str, expected: Expect) {
    expected.assert_eq(&reward(text).check().unwrap_err().to_string());
}

fn bad_prompts(text: &str, expected: Expect) {
    expected.assert_eq(&toml::from_str::<Prompts>(text).unwrap().check().unwrap_err().to_string());
}

/// One of each type, with its least keys.
const EVERY_TYPE: &str = r#"
parts = [
    { type = "exact" },
    { type = "numeric", method = "flexible", weight = 0.5, on_error = "drop" },
    { type = "boxed" },
    { type = "regex", pattern = "a" },
    { type = "format" },
    { type = "length", target_tokens = 10, tolerance_tokens = 5 },
    { type = "overlong", max_tokens = 100, buffer_tokens = 20 },
    { type = "countdown" },
    { type = "command", command = ["jq"] },
    { type = "python", path = "a.py", arguments = { scale = 2.0 } },
    { type = "model", name = "rm", data_sources = ["chat"] },
]
"#;

#[test]
fn every_type_is_read_and_written() {
    let config = reward(EVERY_TYPE);
    config.check().unwrap();
    let names: Vec<&str> = config.parts.iter().map(|part| part.name()).collect();
    assert_eq!(
        names,
        ["exact", "numeric", "boxed", "regex", "format", "length", "overlong", "countdown", "command", "python", "rm"]
    );
    let part = &config.parts[1];
    assert_eq!((part.weight, part.on_error), (0.5, OnError::Drop));
    assert!(
        matches!(&part.function, RewardFunction::Numeric { method: NumericMethod::Flexible, marker, .. } if marker == "####")
    );
    let written = toml::to_string(&config).unwrap();
    assert_eq!(reward(&written), config, "{written}");
    // The schema knows each type by the same word.
    let schema = serde_json::to_string(&schemars::schema_for!(Reward)).unwrap();
    for part in &config.parts {
        assert!(
            schema.contains(&format!("\"const\":\"{}\"", part.function.type_name())),
            "{}",
            part.function.type_name()
        );
    }
}

#[test]
fn unknown_keys_of_a_part_are_refused() {
    for (text, expected) in [
        ("[[parts]]\ntype = 'boxed'\nmarker = 'a'", "unknown field `marker`"),
        ("[[parts]]\ntype = 'exact'\nweigth = 2", "unknown field `weigth`"),
        ("[[parts]]\ntype = 'maths'", "unknown variant `maths`"),
        ("[[parts]]\nweight = 1", "missing field `type`"),
        ("[[part]]\ntype = 'exact'", "unknown field `part`"),
    ] {
        let error = toml::from_str::<Reward>(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn rewards_that_make_no_sense_are_refused() {
    bad_reward(
        "parts = []",
        expect![[
            r#"`reward.parts` is empty: nothing to train towards; add [[reward.parts]] with type = "numeric" or another"#
        ]],
    );
    bad_reward(
        "parts = [{ type = 'exact', weight = nan }, { type = 'exact' }, { type = 'regex', pattern = '', name = 'a b' }]",
        expect![[r#"
            `reward.parts.0.weight` = NaN; it must be a finite number
            `reward.parts.1.name`: two parts are named "exact"; give each its own `name`
            `reward.parts.2.name` = "a b"; it is made of letters, digits, `_`, `-` and `.`
            `reward.parts.2.pattern` is empty; set it, such as '\d+'"#]],
    );
    bad_reward(
        "parts = [{ type = 'command', command = [], timeout_seconds = 0, processes = 0 }, \
         { type = 'python', path = '', calls_in_flight = 0, startup_timeout_seconds = -1 }]",
        expect![[r#"
            `reward.parts.0.command` names no program; write command = ["python3", "reward.py"]
            `reward.parts.0.timeout_seconds` = 0; it is a time above 0 and at most 86400, in seconds
            `reward.parts.0.processes` = 0; it must be from 1 to 1024
            `reward.parts.1.path` is empty; it is the Python file that defines `compute_score`
            `reward.parts.1.startup_timeout_seconds` = -1; it is a time above 0 and at most 86400, in seconds
            `reward.parts.1.calls_in_flight` = 0; it must be from 1 to 65536"#]],
    );
    bad_reward(
        "parts = [{ type = 'overlong', max_tokens = 10, buffer_tokens = 20 }, \
         { type = 'length', target_tokens = 1, tolerance_tokens = 0 }, { type = 'format', tags = ['a', 'a', '<b>'] }, \
         { type = 'numeric', tolerance = -1, marker = '' }]",
        expect![[r#"
            `reward.parts.0.buffer_tokens` = 20; it must be from 1 to 10
            `reward.parts.1.tolerance_tokens` = 0; it must be at least 1
            `reward.parts.2.tags`: "<b>" is no name of an element; write "think" for <think>...</think>
            `reward.parts.2.tags`: each element may be named once
            `reward.parts.3.marker` is empty; set it, or set method = "flexible" to take the last number wherever it stands
            `reward.parts.3.tolerance` = -1; it must be a number of at least 0"#]],
    );
}

#[test]
fn prompts_are_read_with_their_defaults() {
    let config: Prompts = toml::from_str("files = ['a.parquet']").unwrap();
    config.check().unwrap();
    assert_eq!(
        (config.max_prompt_length, config.overlong, config.shuffle, config.chat),
        (512, Overlong::Error, true, true)
    );
    let config: Prompts = toml::from_str("generator = { type = 'countdown', seed = 3 }").unwrap();
    config.check().unwrap();
    assert!(matches!(config.generator, Some(PromptGenerator::Countdown { seed: 3, max_numbers: 4, .. })));
}

#[test]
fn prompts_that_make_no_sense_are_refused() {
    bad_prompts(
        "",
        expect![[
            r#"`prompts.files` is empty and there is no `prompts.generator`: nothing to ask; set files = ["train.parquet"] or generator = { type = "arithmetic" }"#
        ]],
    );
    bad_prompts(
        "files = ['a']\nanswer_key = ''\ngenerator = { type = 'arithmetic', operators = ['/'], operands = 9, min = 5, max = 1, template = 'what?', size = 0 }\nmax_prompt_length = 0\nchat = false\nsystem_prompt = 'a'\noverlong = 'drop'",
        expect![[r#"
            `prompts.files` and `prompts.generator` are both set; remove one
            `prompts.answer_key` says how to read files, but `prompts.generator` makes the prompts; remove one
            `prompts.answer_key` is empty; remove it or name something
            `prompts.system_prompt` is a message, but `prompts.chat` = false has none; remove one
            `prompts.overlong` = "drop" is for files: a generator's prompts are numbered; use "truncate_left"
            `prompts.max_prompt_length` = 0; it must be from 1 to 1099511627776
            `prompts.generator.size` = 0; it must be from 1 to 1099511627776
            `prompts.generator.operators` = ["/"]; name some of "+", "-" and "*"
            `prompts.generator.operands` = 9; it must be from 2 to 6
            `prompts.generator.min` = 5 and `prompts.generator.max` = 1; expected -1000000 <= min <= max <= 1000000
            `prompts.generator.template` lacks {expression}, where the task goes: it is "what?""#]],
    );
    bad_prompts(
        "generator = { type = 'countdown', min_numbers = 5, max_numbers = 3, min = 0, max_target = 0, template = '{numbers}' }",
        expect![[r#"
            `prompts.generator.min_numbers` = 5; it must be from 2 to 3
            `prompts.generator.min` = 0 and `prompts.generator.max` = 99; expected 1 <= min <= max <= 1000000
            `prompts.generator.max_target` = 0; it must be from 1 to 1000000
            `prompts.generator.template` lacks {target}, where the task goes: it is "{numbers}""#]],
    );
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Piece {
    prompts: Option<Prompts>,
    reward: Option<Reward>,
}

#[test]
fn the_examples_of_the_documentation_are_valid() {
    let text = include_str!("../../../docs/rewards.md");
    let blocks: Vec<&str> = text.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(blocks.len() >= 5, "{}", blocks.len());
    for block in blocks {
        let piece: Piece = toml::from_str(block).unwrap_or_else(|error| panic!("{block}\n{error}"));
        assert!(piece.prompts.is_some() || piece.reward.is_some());
        piece.prompts.iter().for_each(|prompts| prompts.check().unwrap());
        piece.reward.iter().for_each(|reward| reward.check().unwrap());
    }
    for name in [
        "exact",
        "numeric",
        "boxed",
        "regex",
        "format",
        "length",
        "overlong",
        "countdown",
        "command",
        "python",
        "model",
    ] {
        assert!(text.contains(&format!("| `{name}` |")), "docs/rewards.md does not list `{name}`");
    }
}
