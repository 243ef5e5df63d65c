//! Where `unsafe` stands in a source file, found by its words: a parser would not look into macros, where
//! kernels are.

/// What an `unsafe` is in front of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// `unsafe { .. }`.
    Block,
    /// `unsafe fn`, which its callers answer for.
    Function,
    /// `unsafe impl`, a promise to the compiler.
    Implementation,
    /// `unsafe trait`, `unsafe extern` blocks and attributes.
    Other,
}

/// One `unsafe`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Site {
    pub(crate) kind: Kind,
    /// The function it is in, or is; of an implementation, `Trait for Type`.
    pub(crate) place: String,
}

/// Every `unsafe` of a source text, in order. Those of types (`unsafe fn()` as the type of a pointer) are
/// none.
pub(crate) fn sites(source: &str) -> Vec<Site> {
    let words = words(source);
    let mut sites = Vec::new();
    // The functions that are open, with the depth of braces outside their bodies.
    let mut open: Vec<(String, usize)> = Vec::new();
    let mut named: Option<String> = None;
    let (mut braces, mut brackets) = (0, 0usize);
    for (at, word) in words.iter().enumerate() {
        let next = |by: usize| words.get(at + by).map_or("", String::as_str);
        match word.as_str() {
            "{" => {
                if let Some(name) = named.take() {
                    open.push((name, braces));
                }
                braces += 1;
            }
            "}" => {
                braces = braces.saturating_sub(1);
                open.pop_if(|(_, outside)| *outside == braces);
            }
            "(" | "[" => brackets += 1,
            ")" | "]" => brackets = brackets.saturating_sub(1),
            // A function without a body: of a trait, or of an extern block. A semicolon in `[T; N]` ends
            // nothing.
            ";" if brackets == 0 => named = None,
            "fn" if is_name(next(1)) => named = Some(function(&words[at + 1..])),
            "unsafe" => {
                let place = || open.last().map_or("outside of functions", |(name, _)| name).to_owned();
                let (kind, place) = match next(1) {
                    "{" => (Kind::Block, place()),
                    "fn" if is_name(next(2)) => (Kind::Function, function(&words[at + 2..])),
                    "extern" if next(2) == "fn" && is_name(next(3)) => {
                        (Kind::Function, function(&words[at + 3..]))
                    }
                    "fn" => continue,
                    "extern" if next(2) == "fn" => continue,
                    "impl" => (Kind::Implementation, implementation(&words[at + 2..])),
                    _ => (Kind::Other, place()),
                };
                sites.push(Site { kind, place });
            }
            _ => {}
        }
    }
    sites
}

/// The name of a function, with the `$` of a macro's argument.
fn function(words: &[String]) -> String {
    words[0].clone()
}

/// `Trait for Type` of the words behind `unsafe impl`, without generics.
fn implementation(words: &[String]) -> String {
    let mut depth = 0;
    let mut text: Vec<&str> = Vec::new();
    for word in words.iter().take_while(|word| !["{", "where", ";"].contains(&word.as_str())) {
        match word.as_str() {
            "<" => depth += 1,
            ">" => depth -= 1,
            _ if depth == 0 => text.push(word),
            _ => {}
        }
    }
    text.join(" ").replace(" : : ", "::").replace(": : ", "::")
}

fn is_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_alphabetic() || c == '_' || c == '$')
}

/// The names, keywords and marks of a source text, without comments, strings and characters.
fn words(source: &str) -> Vec<String> {
    let text: Vec<char> = source.chars().collect();
    let at = |index: usize| text.get(index).copied().unwrap_or('\0');
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    let mut words = Vec::new();
    let mut i = 0;
    while i < text.len() {
        match text[i] {
            '/' if at(i + 1) == '/' => i = find(&text, i, '\n'),
            '/' if at(i + 1) == '*' => i = behind_comment(&text, i),
            '"' => i = behind_string(&text, i + 1),
            // A character, and not a lifetime: 'a' or '\n', but 'a.
            '\'' if at(i + 1) == '\\' => i = find(&text, i + 3, '\'') + 1,
            '\'' if at(i + 2) == '\'' => i += 3,
            c if is_part(c) || c == '$' => {
                let end = (i + 1..text.len()).find(|&j| !is_part(text[j])).unwrap_or(text.len());
                let word: String = text[i..end].iter().collect();
                i = end;
                match (word.as_str(), at(i)) {
                    ("r" | "br" | "cr", '"' | '#') if starts_raw(&text, i) => i = behind_raw_string(&text, i),
                    ("b" | "c", '"') => i = behind_string(&text, i + 1),
                    _ => words.push(word),
                }
            }
            c => {
                if !c.is_whitespace() {
                    words.push(c.to_string());
                }
                i += 1;
            }
        }
    }
    // `extern "C" fn` has lost its string, `->` its meaning: an arrow is no end of generics.
    let mut joined: Vec<String> = Vec::with_capacity(words.len());
    for word in words {
        if word == ">" && joined.last().is_some_and(|last| last == "-") {
            joined.pop();
            continue;
        }
        joined.push(word);
    }
    joined
}

fn find(text: &[char], from: usize, wanted: char) -> usize {
    (from..text.len()).find(|&i| text[i] == wanted).unwrap_or(text.len())
}

fn behind_comment(text: &[char], from: usize) -> usize {
    let (mut depth, mut i) = (0, from);
    while i < text.len() {
        match (text[i], text.get(i + 1)) {
            ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
            ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

fn behind_string(text: &[char], mut i: usize) -> usize {
    while i < text.len() {
        match text[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    i
}

/// Whether the hashes from here lead to a string: `r#fn` is a name.
fn starts_raw(text: &[char], from: usize) -> bool {
    text[from..].iter().find(|&&c| c != '#') == Some(&'"')
}

fn behind_raw_string(text: &[char], from: usize) -> usize {
    let hashes = text[from..].iter().take_while(|&&c| c == '#').count();
    let mut i = from + hashes + 1;
    while i < text.len() {
        if text[i] == '"' && text[i + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes {
            return i + 1 + hashes;
        }
        i += 1;
    }
    i
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(source: &str) -> Vec<(Kind, String)> {
        sites(source).into_iter().map(|site| (site.kind, site.place)).collect()
    }

    fn at(kind: Kind, place: &str) -> (Kind, String) {
        (kind, place.to_owned())
    }

    #[test]
    fn blocks_are_those_of_the_innermost_function() {
        let source = "
            fn outer<'a, const N: usize>(x: &'a [u8; 4]) -> [u8; 4] {
                unsafe { first() };
                fn inner() { if a { unsafe { second() } } }
                let closure = |x| unsafe { third() };
            }
            const X: u8 = unsafe { fourth() };";
        let expected = [("outer"), ("inner"), ("outer"), ("outside of functions")];
        assert_eq!(found(source), expected.map(|place| at(Kind::Block, place)));
    }

    #[test]
    fn functions_implementations_and_others() {
        let source = r#"
            unsafe fn promise(x: usize);
            pub unsafe extern "C" fn callback() {}
            struct Functions { call: unsafe extern "C" fn(i32) -> i32, other: unsafe fn() }
            unsafe impl<'a, T: Fn() -> u8> Send for View<'a, T> where T: Send {}
            unsafe impl bytemuck::Pod for Line {}
            unsafe extern "C" { fn puts(); }
            #[unsafe(no_mangle)]
            fn exported() {}"#;
        assert_eq!(
            found(source),
            [
                at(Kind::Function, "promise"),
                at(Kind::Function, "callback"),
                at(Kind::Implementation, "Send for View"),
                at(Kind::Implementation, "bytemuck::Pod for Line"),
                at(Kind::Other, "outside of functions"),
                at(Kind::Other, "outside of functions"),
            ]
        );
    }

    #[test]
    fn comments_and_texts_have_none() {
        let source = r##"
            // unsafe { }
            /* unsafe /* { */ unsafe { } */
            /// unsafe fn x()
            fn f<'a>() {
                let texts = ("unsafe { \" }", r#"unsafe { " }"#, b"unsafe {", '"', '\'', '{', b'{');
                unsafe { g() }
            }"##;
        assert_eq!(found(source), [at(Kind::Block, "f")]);
    }

    #[test]
    fn macros_are_looked_into() {
        let source = "macro_rules! m { ($name:ident) => { unsafe fn $name(self) { unsafe { x() } } } }";
        assert_eq!(found(source), [at(Kind::Function, "$name"), at(Kind::Block, "$name")]);
    }
}
