//! Preparation: whatever the threads and interruptions, the same shards; whatever changed, an error that says so.

use crate::support::{Folder, sentence, shards};
use tangelo_data::prepare;

#[test]
fn output_does_not_depend_on_threads() {
    let folder = Folder::new();
    folder.write_documents("a.jsonl", 3000);
    let prepared = |threads: usize| {
        let mut options = folder.options("a.jsonl", &format!("p{threads}"));
        (options.num_threads, options.shard_tokens) = (threads, 10_000);
        let manifest = prepare(&options, &()).unwrap();
        assert_eq!(manifest.documents, 3000);
        shards(&options.folder)
    };
    let one = prepared(1);
    assert!(one.len() > 3);
    assert_eq!(prepared(2), one);
    assert_eq!(prepared(7), one);
    assert!(sentence(1) != sentence(2));
}
