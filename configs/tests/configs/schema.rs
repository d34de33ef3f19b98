//! The schema describes every key.

use serde_json::Value;

fn check_descriptions(path: &str, node: &Value, root: &Value) {
    for (key, child) in node["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}{key}");
        let described = child.get("description").and_then(Value::as_str).is_some_and(|d| !d.is_empty());
        assert!(described, "{path} has no description");
        if let Some(name) = child["$ref"].as_str().and_then(|r| r.strip_prefix("#/$defs/")) {
            check_descriptions(&format!("{path}."), &root["$defs"][name], root);
        }
    }
}

#[test]
fn every_key_has_a_description_and_unknown_keys_are_refused() {
    let schema = tangelo_configs::schema();
    check_descriptions("", &schema, &schema);
    assert_eq!(schema["additionalProperties"], false);
    let training = &schema["$defs"]["Training"];
    assert_eq!(training["properties"]["seq_len"]["default"], 2048);
    assert_eq!(training["additionalProperties"], false);
}
