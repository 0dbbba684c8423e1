//! What `/metrics` says.

use super::*;

#[test]
fn counters_are_in_the_form_that_prometheus_reads() {
    let node = Node::start();
    node.done("POST", "/v1/volumes", &json!({ "name": "v", "size": 8 << 20 }));
    node.wait("it is served", |status| {
        status["volumes"][0]["socket"].is_string()
    });
    let (status, text) = node.ask("GET", "/metrics", &node.token, None);
    assert_eq!(status, 200);
    let mut known = std::collections::BTreeMap::new();
    let mut helped = "";
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            helped = help.split_once(' ').unwrap().0;
            continue;
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (metric, kind) = kind.split_once(' ').unwrap();
            assert_eq!(metric, helped, "its help comes first");
            assert!(
                ["counter", "gauge"].contains(&kind),
                "nobody says what it is: {line}"
            );
            assert!(known.insert(metric, kind).is_none(), "twice: {line}");
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap();
        value.parse::<u64>().unwrap();
        let metric = name.split('{').next().unwrap();
        assert!(known.contains_key(metric), "{line} before its type");
    }
    assert_eq!(known["unibody_disk_writes"], "counter");
    assert_eq!(known["unibody_disk_free_bytes"], "gauge");
    assert!(metric_names::METRICS.is_sorted_by_key(|metric| metric.0));
    assert!(
        text.contains("unibody_volume_size_bytes{volume=\"v\"} 8388608\n"),
        "{text}"
    );
    assert!(text.contains("unibody_raft_leads 1\n"), "{text}");
}
