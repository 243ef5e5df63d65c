//! Whether the files of a crate use each other in a circle: then none of them can be read, or moved, without
//! the others.
//!
//! An arrow goes from a file to the one that defines what it uses, by `use` lines and by paths that begin
//! with `crate`, `super` or `self`; re-exports are followed, and are none themselves. What only tests use
//! does not count.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use syn::visit::Visit;
use syn::{Item, UseTree, Visibility};

use crate::cargo::{self, Workspace};

/// Circles that stand, by package: each is to be taken apart, and none to come. A package that is not here
/// has none.
const KNOWN: &[(&str, usize)] = &[];

/// Compares the circles of every package with those that are known, and prints the arrows of a package that
/// differs.
pub(crate) fn check() -> crate::Result {
    let workspace = Workspace::read()?;
    let (mut faults, mut files, mut known) = (Vec::new(), 0, 0);
    for package in &workspace.packages {
        let folder = package.manifest_path.parent().ok_or("a manifest is in a folder")?;
        let mut circles = Vec::new();
        for root in ["src/lib.rs", "src/main.rs"].map(|root| folder.join(root)) {
            if root.is_file() {
                let sources = Sources::read(&root, &|file| std::fs::read_to_string(file).ok())?;
                files += sources.files.len();
                circles.extend(sources.circles());
            }
        }
        let expected = KNOWN.iter().find(|(name, _)| *name == package.name).map_or(0, |&(_, count)| count);
        known += expected;
        if circles.len() != expected {
            faults.push(format!(
                "{} has {} circles of files, and {expected} in the table of xtask/src/circles.rs",
                package.name,
                circles.len()
            ));
            for (index, circle) in circles.iter().enumerate() {
                faults
                    .extend(circle.iter().map(|arrow| format!("  circle {}: {}", index + 1, arrow.shown())));
            }
        }
    }
    crate::reporting::print_lines(&faults);
    println!("{files} files checked for circles; {known} are known");
    Ok(faults.is_empty())
}

/// One file of a circle that uses another one of it.
#[derive(Debug)]
struct Arrow {
    from: PathBuf,
    to: PathBuf,
    names: BTreeSet<String>,
}

impl Arrow {
    fn shown(&self) -> String {
        let file = |file: &Path| file.strip_prefix(cargo::root()).unwrap_or(file).display().to_string();
        let names = self.names.iter().cloned().collect::<Vec<_>>().join(", ");
        format!("{} uses {names} of {}", file(&self.from), file(&self.to))
    }
}

/// A module: of its own file, or inside another one.
#[derive(Debug, Default)]
struct Module {
    file: PathBuf,
    /// What it defines, modules left out.
    items: BTreeSet<String>,
    /// What it gives on under a name, as a path from the crate's root.
    exports: BTreeMap<String, Vec<String>>,
    /// The modules of which it gives on everything.
    globs: Vec<Vec<String>>,
    /// What it uses, as paths from the crate's root.
    uses: BTreeSet<Vec<String>>,
}

/// The modules of a crate, by their paths.
#[derive(Debug, Default)]
struct Sources {
    modules: BTreeMap<Vec<String>, Module>,
    files: BTreeSet<PathBuf>,
}

impl Sources {
    /// All modules from the root file on.
    fn read(root: &Path, text: &dyn Fn(&Path) -> Option<String>) -> crate::Result<Self> {
        let mut sources = Self::default();
        let folder = root.parent().ok_or("a root is in a folder")?;
        sources.read_file(&[root.to_owned()], folder, Vec::new(), text)?;
        Ok(sources)
    }

    /// Reads the first of some files that is there, whose modules have their files in `folder`.
    fn read_file(
        &mut self,
        files: &[PathBuf],
        folder: &Path,
        path: Vec<String>,
        text: &dyn Fn(&Path) -> Option<String>,
    ) -> crate::Result<()> {
        let read = files.iter().find_map(|file| Some((file, text(file)?)));
        let (file, source) = read.ok_or_else(|| format!("none of {files:?} can be read"))?;
        let parsed = syn::parse_file(&source).map_err(|error| format!("{}: {error}", file.display()))?;
        self.files.insert(file.clone());
        self.read_items(&parsed.items, file, folder, path, text)
    }

    fn read_items(
        &mut self,
        items: &[Item],
        file: &Path,
        folder: &Path,
        path: Vec<String>,
        text: &dyn Fn(&Path) -> Option<String>,
    ) -> crate::Result<()> {
        let mut module = Module { file: file.to_owned(), ..Module::default() };
        let mut names = BTreeMap::new();
        let items = || items.iter().filter(|item| !is_for_tests(item));
        for item in items() {
            match item {
                Item::Mod(inner) => {
                    let name = inner.ident.to_string();
                    let (below, folder) = ([path.clone(), vec![name.clone()]].concat(), folder.join(&name));
                    match &inner.content {
                        Some((_, items)) => self.read_items(items, file, &folder, below, text)?,
                        None => {
                            let files = [folder.with_extension("rs"), folder.join("mod.rs")];
                            self.read_file(&files, &folder, below, text)?;
                        }
                    }
                }
                Item::Use(line) => {
                    let is_private = matches!(line.vis, Visibility::Inherited);
                    for (name, mut target) in leaves(&line.tree, &path) {
                        names.insert(name.clone(), target.clone());
                        if is_private {
                            module.uses.insert(target);
                        } else if name == "*" {
                            target.pop();
                            module.globs.push(target);
                        } else {
                            module.exports.insert(name, target);
                        }
                    }
                }
                item => module.items.extend(name_of(item)),
            }
        }
        let mut paths = Paths { module: &path, names: &names, found: &mut module.uses };
        for item in items().filter(|item| !matches!(item, Item::Mod(_) | Item::Use(_))) {
            paths.visit_item(item);
        }
        self.modules.insert(path, module);
        Ok(())
    }

    /// The file that defines what a path from the root names, and the name.
    fn definition(&self, target: &[String]) -> Option<(&Path, String)> {
        let mut target = target.to_vec();
        // Re-exports of re-exports, but not for ever.
        for _ in 0..8 {
            let depth =
                (0..=target.len()).rev().find(|&depth| self.modules.contains_key(&target[..depth]))?;
            let module = &self.modules[&target[..depth]];
            let Some(name) = target.get(depth) else {
                // The module itself, whose items follow in code.
                return None;
            };
            if module.items.contains(name) || name == "*" {
                return Some((&module.file, name.clone()));
            }
            target = match module.exports.get(name) {
                Some(export) => [export, &target[depth + 1..]].concat(),
                None => {
                    let glob = module.globs.iter().find(|glob| {
                        self.modules.get(*glob).is_some_and(|module| {
                            module.items.contains(name) || module.exports.contains_key(name)
                        })
                    });
                    [glob?, &target[depth..]].concat()
                }
            };
        }
        None
    }

    /// The arrows inside each set of files that use each other.
    fn circles(&self) -> Vec<Vec<Arrow>> {
        let mut arrows: BTreeMap<(&Path, &Path), BTreeSet<String>> = BTreeMap::new();
        for module in self.modules.values() {
            for (to, name) in module.uses.iter().filter_map(|target| self.definition(target)) {
                if to != module.file {
                    arrows.entry((&module.file, to)).or_default().insert(name);
                }
            }
        }
        let reach: BTreeMap<&Path, BTreeSet<&Path>> =
            self.files.iter().map(|file| (&**file, reached(file, &arrows))).collect();
        let mut circles: BTreeMap<BTreeSet<&Path>, Vec<Arrow>> = BTreeMap::new();
        for (&(from, to), names) in &arrows {
            if reach[to].contains(from) {
                let circle = reach[from].iter().copied().filter(|&file| reach[file].contains(from)).collect();
                let arrow = Arrow { from: from.to_owned(), to: to.to_owned(), names: names.clone() };
                circles.entry(circle).or_default().push(arrow);
            }
        }
        circles.into_values().collect()
    }
}

/// The files that arrows lead to from a file.
fn reached<'a>(
    from: &'a Path,
    arrows: &BTreeMap<(&'a Path, &'a Path), BTreeSet<String>>,
) -> BTreeSet<&'a Path> {
    let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
    while let Some(file) = open.pop() {
        for &(_, to) in arrows.keys().filter(|(from, _)| *from == file) {
            if seen.insert(to) {
                open.push(to);
            }
        }
    }
    seen
}

/// Whether an item is compiled for tests alone.
fn is_for_tests(item: &Item) -> bool {
    let attributes = match item {
        Item::Mod(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Const(item) => &item.attrs,
        _ => return false,
    };
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Path>().is_ok_and(|condition| condition.is_ident("test"))
    })
}

/// The name that an item defines.
fn name_of(item: &Item) -> Option<String> {
    Some(match item {
        Item::Const(item) => item.ident.to_string(),
        Item::Enum(item) => item.ident.to_string(),
        Item::Fn(item) => item.sig.ident.to_string(),
        Item::Macro(item) => item.ident.as_ref()?.to_string(),
        Item::Static(item) => item.ident.to_string(),
        Item::Struct(item) => item.ident.to_string(),
        Item::Trait(item) => item.ident.to_string(),
        Item::Type(item) => item.ident.to_string(),
        Item::Union(item) => item.ident.to_string(),
        _ => return None,
    })
}

/// A path inside the crate as one from its root; none of another crate.
fn from_root(segments: &[String], module: &[String]) -> Option<Vec<String>> {
    let (mut base, mut rest) = match segments.first()?.as_str() {
        "crate" => (Vec::new(), &segments[1..]),
        "self" => (module.to_vec(), &segments[1..]),
        "super" => (module.to_vec(), segments),
        _ => return None,
    };
    while rest.first().is_some_and(|segment| segment == "super") {
        base.pop()?;
        rest = &rest[1..];
    }
    Some([&base, rest].concat())
}

/// The names that a `use` tree brings into a module, with what they stand for. A first segment that is no
/// keyword may be a sibling module.
fn leaves(tree: &UseTree, module: &[String]) -> Vec<(String, Vec<String>)> {
    fn walk(tree: &UseTree, before: &[String], found: &mut Vec<(String, Vec<String>)>) {
        match tree {
            UseTree::Path(path) => walk(&path.tree, &[before, &[path.ident.to_string()]].concat(), found),
            UseTree::Name(name) if name.ident == "self" => {
                found.extend(before.last().map(|name| (name.clone(), before.to_vec())));
            }
            UseTree::Name(name) => {
                found.push((name.ident.to_string(), [before, &[name.ident.to_string()]].concat()));
            }
            UseTree::Rename(name) => {
                found.push((name.rename.to_string(), [before, &[name.ident.to_string()]].concat()));
            }
            UseTree::Glob(_) => found.push(("*".to_owned(), [before, &["*".to_owned()]].concat())),
            UseTree::Group(group) => group.items.iter().for_each(|tree| walk(tree, before, found)),
        }
    }
    let mut found = Vec::new();
    walk(tree, &[], &mut found);
    let absolute = |path: Vec<String>| from_root(&path, module).unwrap_or_else(|| [module, &path].concat());
    found.into_iter().map(|(name, path)| (name, absolute(path))).collect()
}

/// Paths in code.
struct Paths<'a> {
    module: &'a [String],
    /// What `use` lines bring into the module.
    names: &'a BTreeMap<String, Vec<String>>,
    found: &'a mut BTreeSet<Vec<String>>,
}

impl<'ast> Visit<'ast> for Paths<'_> {
    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        // `self` alone is a value.
        if segments.len() > 1 {
            let target =
                from_root(&segments, self.module).unwrap_or_else(|| match self.names.get(&segments[0]) {
                    Some(module) => [module, &segments[1..]].concat(),
                    None => [self.module, &segments].concat(),
                });
            self.found.insert(target);
        }
        syn::visit::visit_path(self, path);
    }

    fn visit_item_use(&mut self, line: &'ast syn::ItemUse) {
        self.found.extend(leaves(&line.tree, self.module).into_iter().map(|(_, path)| path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circles(files: &[(&str, &str)]) -> Vec<Vec<(String, String, String)>> {
        let text = |file: &Path| {
            files.iter().find(|(name, _)| Path::new(name) == file).map(|(_, text)| (*text).to_owned())
        };
        let sources = Sources::read(Path::new(files[0].0), &text).unwrap();
        let shown = |file: &Path| file.display().to_string();
        let arrow = |arrow: &Arrow| {
            let names = arrow.names.iter().cloned().collect::<Vec<_>>().join(" ");
            (shown(&arrow.from), names, shown(&arrow.to))
        };
        sources.circles().iter().map(|circle| circle.iter().map(arrow).collect()).collect()
    }

    fn arrow(from: &str, names: &str, to: &str) -> (String, String, String) {
        (from.to_owned(), names.to_owned(), to.to_owned())
    }

    #[test]
    fn files_of_this_workspace_stand_in_known_circles_alone() {
        assert!(check().unwrap());
    }

    #[test]
    fn two_files_that_use_each_other_are_a_circle() {
        let files = [
            ("lib.rs", "mod a; mod b; pub use a::A;"),
            ("a.rs", "use crate::b::{B, other}; pub struct A;"),
            ("b/mod.rs", "use super::A; pub struct B(crate::a::A); pub fn other() {}"),
        ];
        let expected = [vec![arrow("a.rs", "B other", "b/mod.rs"), arrow("b/mod.rs", "A", "a.rs")]];
        assert_eq!(circles(&files), expected);
    }

    #[test]
    fn a_circle_may_have_three_files_and_go_through_code() {
        let files = [
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b::b; pub fn a() { b() }"),
            ("b.rs", "pub fn b() { crate::c::c() }"),
            ("c.rs", "use crate::a; pub fn c() { a::a() }"),
        ];
        let expected =
            [vec![arrow("a.rs", "b", "b.rs"), arrow("b.rs", "c", "c.rs"), arrow("c.rs", "a", "a.rs")]];
        assert_eq!(circles(&files), expected);
    }

    #[test]
    fn re_exports_tests_and_one_way_are_none() {
        let files = [
            ("lib.rs", "mod a; mod b; pub(crate) use b::*; pub use a::A;"),
            ("a.rs", "pub struct A; #[cfg(test)] mod tests { use crate::B; }"),
            ("b.rs", "use crate::A; pub struct B(A);"),
        ];
        assert!(circles(&files).is_empty());
    }

    #[test]
    fn a_folder_that_uses_what_it_is_used_by_is_a_circle() {
        let files = [
            ("lib.rs", "mod a;"),
            ("a/mod.rs", "mod b; use b::run; pub struct Size; pub fn f() { run() }"),
            ("a/b.rs", "pub fn run() -> super::Size { super::Size }"),
        ];
        let expected = [vec![arrow("a/b.rs", "Size", "a/mod.rs"), arrow("a/mod.rs", "run", "a/b.rs")]];
        assert_eq!(circles(&files), expected);
    }
}
