//! Lints the tree: what the documents say about it must be true of it.
//!
//! * A back-quoted path in the architecture or in the life of a write or a read exists; `path.rs::name` is defined there. In
//!   a table with a column `Function`, each back-quoted name of that column is defined in the row's file.
//! * No Rust file is longer than can be read in a sitting.
//! * Every decision record is in the index, every dependency in `docs/dependencies.md`.
//! * No file names a directory of the machine it was written on.
//!
//! Each lint is a function from text to complaints and is itself tested with text that is wrong. Deliberately absent: a
//! parser of Rust (a definition is found by its keyword) and any use of git (a tree without history is checked as well).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Documents whose paths and names are looked up, and the least number of names each must give.
const CHECKED: &[(&str, usize)] = &[
    ("docs/architecture.md", 0),
    ("docs/life-of-a-write.md", 8),
    ("docs/life-of-a-read.md", 8),
];

/// Longest Rust file, lines.
const LINES_MAX: usize = 700;
/// Files that are longer, with the length they may not pass. To be split, not to be added to.
const LONG: &[(&str, usize)] = &[
    ("dataplane/src/mirror/chunks.rs", 800),
    ("dataplane/src/mirror/ops.rs", 1150),
    ("dataplane/tests/common/world.rs", 1000),
    ("tests/src/sim/world.rs", 750),
];

/// Paths that a document may name before they are there. To be taken from this list when they are.
const ANNOUNCED: &[&str] = &[];

/// Top-level directories; a back-quoted word that begins with one of them is a path of the tree.
const TOP: &[&str] = &[
    "dataplane",
    "control",
    "vmm-adapter",
    "tools",
    "benches",
    "tests",
    "docs",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the tree")
        .to_path_buf()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every file of the tree that a person wrote, relative to its root.
fn files() -> Vec<String> {
    fn walk(dir: &Path, root: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(dir).expect("a directory of the tree") {
            let entry = entry.expect("an entry of a directory of the tree");
            let name = entry.file_name().to_string_lossy().into_owned();
            let kind = entry.file_type().expect("the type of a file of the tree");
            // Built, kept by git, or arbitrary bytes.
            if matches!(name.as_str(), "target" | ".git" | "corpus" | "artifacts") {
                continue;
            }
            if kind.is_dir() {
                walk(&entry.path(), root, found);
            } else if kind.is_file() {
                let path = entry.path();
                let path = path.strip_prefix(root).expect("below the root");
                found.push(path.to_string_lossy().into_owned());
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), &root(), &mut found);
    found.sort();
    found
}

/// The back-quoted words of a line.
fn quoted(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// Lines outside of code blocks, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    (1..).zip(text.lines()).filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fence && !fenced && !line.starts_with("    ")
    })
}

fn cells(line: &str) -> Option<Vec<&str>> {
    let line = line.trim().strip_prefix('|')?;
    Some(
        line.strip_suffix('|')
            .unwrap_or(line)
            .split('|')
            .map(str::trim)
            .collect(),
    )
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether `source` defines `name`: a function, or a type and its function as `Type::function`.
fn defines(source: &str, name: &str) -> bool {
    const KEYWORDS: &[&str] = &["fn", "struct", "enum", "trait", "const", "static", "type", "mod"];
    let name = name.trim_end_matches("()");
    let defined = |name: &str, keywords: &[&str]| {
        source.match_indices(name).any(|(at, _)| {
            let (before, after) = (&source[..at], &source[at + name.len()..]);
            let before_word = before.trim_end();
            !after.starts_with(is_word)
                && before_word.len() < before.len()
                && keywords.iter().any(|keyword| {
                    before_word
                        .strip_suffix(keyword)
                        .is_some_and(|rest| !rest.ends_with(is_word))
                })
        })
    };
    let mentioned = |name: &str| {
        source.match_indices(name).any(|(at, _)| {
            !source[..at].ends_with(is_word) && !source[at + name.len()..].starts_with(is_word)
        })
    };
    match name.rsplit_once("::") {
        Some((kind, function)) => mentioned(kind) && defined(function, &["fn"]),
        None => defined(name, KEYWORDS),
    }
}

/// What is wrong with the paths and names in a document, and how many names were looked up.
fn check_names(
    text: &str,
    source_of: impl Fn(&str) -> Option<String>,
    exists: impl Fn(&str) -> bool,
) -> (Vec<String>, usize) {
    let (mut wrong, mut names) = (Vec::new(), 0);
    let mut column = None;
    for (number, line) in prose(text) {
        let mut file = None;
        for word in quoted(line) {
            let (path, name) = match word.split_once(".rs::") {
                Some((path, name)) => (format!("{path}.rs"), Some(name)),
                None => (word.to_owned(), None),
            };
            let top = path.split('/').next().unwrap_or_default();
            if !path.contains('/') || !TOP.contains(&top) {
                continue;
            }
            if !exists(&path) {
                wrong.push(format!("line {number}: there is no {path}"));
                continue;
            }
            if let Some(name) = name {
                names += 1;
                if !source_of(&path).is_some_and(|source| defines(&source, name)) {
                    wrong.push(format!("line {number}: {path} does not define {name}"));
                }
            } else if path.ends_with(".rs") && file.is_none() {
                file = Some(path);
            }
        }
        let Some(cells) = cells(line) else {
            column = None;
            continue;
        };
        if let Some(at) = cells
            .iter()
            .position(|cell| cell.eq_ignore_ascii_case("function"))
        {
            column = Some(at);
            continue;
        }
        for name in column
            .and_then(|at| cells.get(at))
            .into_iter()
            .flat_map(|cell| quoted(cell))
        {
            names += 1;
            match file.as_deref().map(&source_of) {
                None => wrong.push(format!(
                    "line {number}: a function without an existing file: {name}"
                )),
                Some(source) if !source.as_deref().is_some_and(|source| defines(source, name)) => {
                    wrong.push(format!(
                        "line {number}: {} does not define {name}",
                        file.as_deref().unwrap_or("")
                    ));
                }
                Some(_) => {}
            }
        }
    }
    (wrong, names)
}

#[test]
fn the_documents_name_what_exists() {
    for &(document, least) in CHECKED {
        let source_of = |path: &str| fs::read_to_string(root().join(path)).ok();
        let exists = |path: &str| {
            let found = root().join(path);
            let found = if path.ends_with('/') {
                found.is_dir()
            } else {
                found.exists()
            };
            assert!(
                !found || !ANNOUNCED.contains(&path),
                "{path} is there: take it from the list ANNOUNCED"
            );
            found || ANNOUNCED.contains(&path)
        };
        let (wrong, names) = check_names(&read(document), source_of, exists);
        assert!(wrong.is_empty(), "{document}:\n{}", wrong.join("\n"));
        assert!(
            names >= least,
            "{document} names {names} functions only: say where each step is"
        );
    }
}

#[test]
fn a_document_that_is_wrong_is_noticed() {
    let source = "impl Queue {\n    pub fn poll(&mut self) {}\n}\nconst DEPTH: u32 = 1;\n";
    let check = |text: &str| {
        let source_of = |path: &str| (path == "dataplane/src/queue.rs").then(|| source.to_owned());
        check_names(text, source_of, |path| {
            matches!(path, "dataplane/src/queue.rs" | "docs/")
        })
    };
    let table = |name: &str| {
        format!(
            "| Step | File | Function |\n| --- | --- | --- |\n| 1 | `dataplane/src/queue.rs` | `{name}` |\n"
        )
    };
    for right in ["poll", "poll()", "Queue::poll", "DEPTH"] {
        assert_eq!(check(&table(right)), (vec![], 1), "{right}");
    }
    for wrong in ["pol", "oll", "push", "Ring::poll", "Queue", "Queue::DEPTH"] {
        assert_eq!(check(&table(wrong)).0.len(), 1, "{wrong}");
    }
    assert_eq!(check("see `dataplane/src/queue.rs::poll` in `docs/`").0.len(), 0);
    assert_eq!(check("see `dataplane/src/queue.rs::gone`").0.len(), 1);
    assert_eq!(check("see `dataplane/src/gone.rs`").0.len(), 1);
    assert_eq!(
        check("| Function |\n| --- |\n| `poll` |\n").0.len(),
        1,
        "a name without its file"
    );
    assert_eq!(
        check("```\n`dataplane/src/gone.rs`\n```\nand `and/or`").0.len(),
        0,
        "code, and other words"
    );
}

#[test]
fn files_are_read_in_a_sitting() {
    let files = files();
    let rust: Vec<_> = files.iter().filter(|path| path.ends_with(".rs")).collect();
    assert!(rust.len() > 20, "the walk found {} Rust files only", rust.len());
    let long: BTreeMap<_, _> = LONG.iter().copied().collect();
    let mut wrong = Vec::new();
    for &path in &rust {
        let lines = read(path).lines().count();
        let max = long.get(path.as_str()).copied().unwrap_or(LINES_MAX);
        if lines > max {
            wrong.push(format!("{path} has {lines} lines, {max} are allowed: split it"));
        }
        if lines * 10 < LINES_MAX * 9 && long.contains_key(path.as_str()) {
            wrong.push(format!("{path} is short again: take it from the list LONG"));
        }
    }
    for path in long.keys().filter(|path| !rust.iter().any(|file| file == *path)) {
        wrong.push(format!("{path} is gone: take it from the list LONG"));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What is wrong with an index of decision records.
fn check_decisions(index: &str, records: &BTreeSet<String>) -> Vec<String> {
    let mut wrong = Vec::new();
    let listed: BTreeSet<String> = index
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .filter(|target| target.ends_with(".md") && !target.contains('/'))
        .map(str::to_owned)
        .collect();
    wrong.extend(
        records
            .difference(&listed)
            .map(|name| format!("{name} is not in the index")),
    );
    wrong.extend(
        listed
            .difference(records)
            .map(|name| format!("the index names {name}, which is not there")),
    );
    let mut numbers = BTreeSet::new();
    for name in records {
        let number = name.split('-').next().unwrap_or_default();
        if number.len() != 4 || !number.chars().all(|c| c.is_ascii_digit()) {
            wrong.push(format!("{name} does not begin with a number of four digits"));
        } else if !numbers.insert(number) {
            wrong.push(format!("number {number} was given twice"));
        }
    }
    wrong
}

#[test]
fn every_decision_is_in_the_index() {
    let records: BTreeSet<String> = files()
        .iter()
        .filter_map(|path| path.strip_prefix("docs/decisions/"))
        .filter(|name| *name != "README.md")
        .map(str::to_owned)
        .collect();
    let wrong = check_decisions(&read("docs/decisions/README.md"), &records);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    let two = ["0001-a.md", "0001-b.md"].map(str::to_owned).into();
    assert_eq!(
        check_decisions("[a](0001-a.md) [b](0001-b.md)", &two).len(),
        1,
        "a number given twice"
    );
    assert_eq!(
        check_decisions("[a](0001-a.md) [c](0002-c.md)", &two).len(),
        3,
        "one missing, one gone"
    );
}

/// What `docs/dependencies.md` gets wrong: `declared` are the workspace's, `used` those that a crate of it depends on.
fn check_dependencies(document: &str, declared: &BTreeSet<String>, used: &BTreeSet<String>) -> Vec<String> {
    let (mut in_use, mut later) = (BTreeSet::new(), BTreeSet::new());
    let mut section = "";
    for (_, line) in prose(document) {
        if let Some(title) = line.strip_prefix("## ") {
            section = title.trim();
        }
        if let Some(first) = cells(line).and_then(|cells| quoted(cells[0]).next()) {
            match section {
                "In use" => in_use.insert(first.to_owned()),
                "Not used yet" => later.insert(first.to_owned()),
                _ => false,
            };
        }
    }
    let mut wrong: Vec<String> = Vec::new();
    let known: BTreeSet<_> = in_use.union(&later).cloned().collect();
    wrong.extend(
        declared
            .difference(&known)
            .map(|name| format!("{name} is not in the document")),
    );
    wrong.extend(
        used.difference(&in_use)
            .map(|name| format!("{name} is used but not under `In use`")),
    );
    wrong.extend(
        in_use
            .difference(used)
            .map(|name| format!("{name} is under `In use`, but nothing uses it")),
    );
    wrong
}

#[test]
fn every_dependency_has_a_reason() {
    fn external(table: &toml::Table) -> impl Iterator<Item = String> {
        let ours =
            |name: &str, value: &toml::Value| name.starts_with("unibody-") || value.get("path").is_some();
        table
            .iter()
            .filter(move |(name, value)| !ours(name, value))
            .map(|(name, _)| name.clone())
    }
    let parse = |path: &str| {
        read(path)
            .parse::<toml::Table>()
            .unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    let workspace = parse("Cargo.toml");
    let declared: BTreeSet<String> = external(
        workspace["workspace"]["dependencies"]
            .as_table()
            .expect("a table"),
    )
    .collect();
    let mut used = BTreeSet::new();
    for path in files().iter().filter(|path| path.ends_with("/Cargo.toml")) {
        let manifest = parse(path);
        let mut places = vec![&manifest];
        if let Some(targets) = manifest.get("target").and_then(toml::Value::as_table) {
            places.extend(targets.values().filter_map(toml::Value::as_table));
        }
        for place in places {
            for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
                if let Some(table) = place.get(kind).and_then(toml::Value::as_table) {
                    used.extend(external(table));
                }
            }
        }
    }
    assert!(
        used.len() > 5,
        "the manifests gave {} dependencies only",
        used.len()
    );
    let wrong = check_dependencies(&read("docs/dependencies.md"), &declared, &used);
    assert!(wrong.is_empty(), "docs/dependencies.md:\n{}", wrong.join("\n"));

    let set = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
    let text = "## In use\n\n| `a` | x |\n| `b` | x |\n\n## Not used yet\n\n| `c` | x |\n";
    assert_eq!(
        check_dependencies(text, &set(&["a", "c"]), &set(&["a", "b"])),
        Vec::<String>::new()
    );
    assert_eq!(
        check_dependencies(text, &set(&["d"]), &set(&["a", "b"])).len(),
        1,
        "not listed"
    );
    assert_eq!(
        check_dependencies(text, &set(&[]), &set(&["a", "b", "c"])).len(),
        1,
        "used by now"
    );
    assert_eq!(
        check_dependencies(text, &set(&[]), &set(&["a"])).len(),
        1,
        "not used any more"
    );
}

/// Names of directories that exist only where a text was written.
fn machine_paths(text: &str) -> Vec<usize> {
    // In two pieces, so that this file does not find itself.
    let needles = ["work", "root", "home"].map(|name| format!("/{name}/"));
    let inside = |c: char| is_word(c) || matches!(c, '-' | '.' | '/' | '}' | '$');
    let found = |line: &str| {
        needles.iter().any(|needle| {
            line.match_indices(needle.as_str())
                .any(|(at, _)| !line[..at].ends_with(inside))
        })
    };
    (1..)
        .zip(text.lines())
        .filter(|(_, line)| found(line))
        .map(|(number, _)| number)
        .collect()
}

#[test]
fn no_file_names_the_machine_it_was_written_on() {
    let mut wrong = Vec::new();
    for path in files() {
        // What is not text has no such names that a person wrote.
        if let Ok(text) = fs::read_to_string(root().join(&path)) {
            wrong.extend(machine_paths(&text).iter().map(|line| format!("{path}:{line}")));
        }
    }
    assert!(
        wrong.is_empty(),
        "paths of somebody's machine:\n{}",
        wrong.join("\n")
    );

    let directory = "work";
    assert_eq!(machine_paths(&format!("right\nsee `/{directory}/x`")), [2]);
    assert_eq!(machine_paths("docs/work/x and ./root/x"), [] as [usize; 0]);
}
