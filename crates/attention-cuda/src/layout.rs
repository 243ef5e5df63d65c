//! How the kernels lay their structs out, from their text: for tests that compare them with those of the
//! host.

/// A field with where it begins.
type Field = (String, usize);

/// The size and alignment of a type; `None` for a struct of the text.
fn scalar(kind: &str) -> Option<usize> {
    let sizes = [
        ("long long", 8),
        ("unsigned long long", 8),
        ("double", 8),
        ("float", 4),
        ("int", 4),
        ("unsigned", 4),
    ];
    sizes.into_iter().find(|&(name, _)| name == kind).map(|(_, size)| size)
}

/// The size and alignment of a type of the text.
fn measure(text: &str, kind: &str) -> (usize, usize) {
    scalar(kind).map_or_else(
        || {
            let (_, size, align) = laid_out(text, kind);
            (size, align)
        },
        |size| (size, size),
    )
}

/// The fields of a struct of a text with their offsets, its size and its alignment, as C++ lays it out. A
/// union of pointers is one field, whose names are joined by `_or_`.
pub(crate) fn laid_out(text: &str, name: &str) -> (Vec<Field>, usize, usize) {
    let (_, after) = text.split_once(&format!("struct {name} {{\n")).unwrap_or_else(|| panic!("no {name}"));
    let (body, _) = after.split_once("\n};").unwrap();
    // With what a macro leaves out of some variants, which comes last.
    let code = body.lines().filter(|line| !line.starts_with('#'));
    let code: String = code.map(|line| line.split("//").next().unwrap()).collect();
    let (mut fields, mut end, mut align) = (Vec::new(), 0_usize, 1);
    let mut union: Option<Vec<String>> = None;
    for declaration in code.split(';').map(str::trim).filter(|declaration| !declaration.is_empty()) {
        let declaration = match declaration.strip_prefix("union {") {
            Some(first) => {
                union = Some(Vec::new());
                first.trim()
            }
            None => declaration,
        };
        if declaration == "}" {
            let names = union.take().expect("a union");
            end = end.next_multiple_of(8);
            align = align.max(8);
            fields.push((names.join("_or_"), end));
            end += 8;
            continue;
        }
        let first = declaration.split(',').next().unwrap();
        let (before, _) = first.rsplit_once(' ').unwrap();
        let names = &declaration[before.len()..];
        let kind = before.trim_start_matches("const ").trim();
        for field in names.split(',').map(str::trim) {
            if let (Some(union), Some(pointer)) = (&mut union, field.strip_prefix('*')) {
                union.push(pointer.to_owned());
                continue;
            }
            let (field, size, alignment) = match field.strip_prefix('*') {
                Some(pointer) => (pointer, 8, 8),
                None => {
                    let (size, alignment) = measure(text, kind);
                    (field, size, alignment)
                }
            };
            let (field, count) = match field.split_once('[') {
                Some((field, count)) => (field, count.trim_end_matches(']').parse().unwrap()),
                None => (field, 1),
            };
            end = end.next_multiple_of(alignment);
            fields.push((field.to_owned(), end));
            end += size * count;
            align = align.max(alignment);
        }
    }
    (fields, end.next_multiple_of(align), align)
}

/// Compares all fields of a struct with those of a text's struct of the same name. A field `padding` of the
/// host is the padding that C++ has at the end, unless the text has it too.
macro_rules! assert_laid_out {
    ($text:expr, $name:ident: $($field:ident),*) => {
        let (mut fields, size, _) = $crate::layout::laid_out($text, stringify!($name));
        assert_eq!(size, size_of::<$name>(), stringify!($name));
        let expected = [$((stringify!($field).to_owned(), std::mem::offset_of!($name, $field))),*];
        if let Some(padding) = expected.last().filter(|(name, _)| name == "padding") {
            fields.push(padding.clone());
        }
        assert_eq!(fields, expected, stringify!($name));
        // Every field is in the list.
        let _ = |$name { $($field: _),* }: $name| ();
    };
}
pub(crate) use assert_laid_out;

#[test]
fn offsets_are_those_of_cpp() {
    let text = "struct Inner {\n    int a;\n    long long b[2];\n};\nstruct Outer {\n    // x; y\n    \
        const unsigned *p, *q;\n    unsigned key[3];\n    Inner inner;\n    union {\n        float *f;\n        \
        float *g;\n    };\n    unsigned long long wide;\n    float last;\n};\n";
    let fields = [("p", 0), ("q", 8), ("key", 16), ("inner", 32), ("f_or_g", 56), ("wide", 64), ("last", 72)];
    let fields = fields.map(|(name, offset)| (name.to_owned(), offset)).to_vec();
    assert_eq!(laid_out(text, "Inner"), (vec![("a".to_owned(), 0), ("b".to_owned(), 8)], 24, 8));
    assert_eq!(laid_out(text, "Outer"), (fields, 80, 8));
}
