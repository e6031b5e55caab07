//! Which other files a file of containerd's configuration brings in.

use std::path::{Component, Path, PathBuf};

use toml_edit::{DocumentMut, Item};

/// The `imports` of a file: absolute paths, in which a `*` stands for names that the caller finds
/// (`matches`). Relative ones are relative to the file.
pub fn imports(path: &Path, text: &str) -> Vec<PathBuf> {
    let Ok(document) = text.parse::<DocumentMut>() else { return Vec::new() };
    let listed = document.get("imports").and_then(Item::as_array);
    let dir = path.parent().unwrap_or_else(|| Path::new("/"));
    let listed = listed.into_iter().flatten().filter_map(|value| value.as_str());
    listed.map(|import| clean(&dir.join(import))).collect()
}

/// Go's `filepath.Clean`, as far as it matters for a path that exists.
fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => (),
            Component::ParentDir => {
                cleaned.pop();
            }
            component => cleaned.push(component),
        }
    }
    cleaned
}

/// Whether a name in a directory fits one component of a pattern: `*` is any text, `?` any
/// character (Go's `filepath.Match`, without its `[…]`).
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // Where the last star was, and how much of the name it takes so far.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == '?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((at, taken)) = star else { return false };
                star = Some((at, taken + 1));
                p = at + 1;
                n = taken + 1;
            }
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}
