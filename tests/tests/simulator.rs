use unibody_tests::sim;
#[test]
fn quick() {
    let from: u64 = std::env::var("FROM").ok().map_or(0, |s| s.parse().unwrap());
    let n: u64 = std::env::var("N").ok().map_or(20, |s| s.parse().unwrap());
    let trace = std::env::var("UNIBODY_TRACE").is_ok();
    let mut seen = std::collections::BTreeMap::new();
    let mut bad = 0;
    for seed in from..from + n {
        let run = sim::run_seed(seed, trace);
        for (k, v) in &run.stats.seen {
            *seen.entry(*k).or_insert(0) += v;
        }
        if let Err(e) = &run.verdict {
            bad += 1;
            println!("SEED {seed}: {}", e.chars().take(700).collect::<String>());
        }
    }
    println!("{bad} bad of {n}; {seen:#?}");
}
