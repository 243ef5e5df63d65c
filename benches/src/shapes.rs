//! The shapes that every benchmark of the project uses, so that their numbers can be put side by side.

use attention_core::{DType, Dimensions};

/// A shape of the shared list, with the dtypes it is measured in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The sizes.
    pub dims: Dimensions,
    /// The dtypes it is measured in unless others are asked for.
    pub dtypes: &'static [DType],
    /// Whether it belongs to the subset for a quick look: a second or less for each measurement.
    pub quick: bool,
}

impl Shape {
    /// Whether this is one step of a decoder: a single query row.
    pub const fn is_decode(&self) -> bool {
        self.dims.query_length == 1
    }
}

const F32_BF16: &[DType] = &[DType::F32, DType::Bf16];
const F32_HALVES: &[DType] = &[DType::F32, DType::Bf16, DType::F16];

/// The shared list: short, medium and long sequences of a small model, a wide head, grouped heads, and two
/// decoding steps, the second with grouped heads.
pub const SHAPES: &[Shape] = &[
    shape([1, 512, 512, 8, 8, 64], F32_BF16, true),
    shape([1, 2048, 2048, 8, 8, 64], F32_HALVES, true),
    shape([1, 8192, 8192, 8, 8, 64], F32_BF16, false),
    shape([1, 2048, 2048, 16, 16, 128], F32_BF16, false),
    shape([1, 1024, 1024, 32, 8, 128], F32_BF16, true),
    shape([1, 1, 4096, 32, 32, 128], F32_BF16, true),
    shape([1, 1, 4096, 32, 8, 128], F32_BF16, true),
];

const fn shape(sizes: [usize; 6], dtypes: &'static [DType], quick: bool) -> Shape {
    let [b, t, s, n, k, h] = sizes;
    Shape { dims: dimensions([b, t, s, n, k, h, h]), dtypes, quick }
}

const fn dimensions(sizes: [usize; 7]) -> Dimensions {
    let [batch, query_length, key_length, query_heads, key_heads, head_dim, value_head_dim] = sizes;
    Dimensions { batch, query_length, key_length, query_heads, key_heads, head_dim, value_head_dim }
}

/// Reads `B,T,S,N,K,H` or `B,T,S,N,K,H,Hv`.
///
/// # Errors
/// A sentence that says what is expected, where there are not six or seven positive numbers, or `N % K` is
/// not 0.
///
/// # Examples
/// ```
/// let dims = attention_benches::parse_shape("1,128,256,8,2,64").unwrap();
/// assert_eq!((dims.group_size(), dims.value_head_dim), (4, 64));
/// ```
pub fn parse_shape(text: &str) -> Result<Dimensions, String> {
    let wrong = |what: &str| format!("shape '{text}' {what}; expected B,T,S,N,K,H or B,T,S,N,K,H,Hv");
    let sizes: Vec<usize> = (text.split(','))
        .map(|size| size.trim().parse())
        .collect::<Result<_, _>>()
        .map_err(|error| wrong(&format!("does not consist of numbers ({error})")))?;
    let dims = match sizes[..] {
        [b, t, s, n, k, h] => dimensions([b, t, s, n, k, h, h]),
        [b, t, s, n, k, h, hv] => dimensions([b, t, s, n, k, h, hv]),
        _ => return Err(wrong(&format!("has {} sizes", sizes.len()))),
    };
    if sizes.contains(&0) {
        return Err(wrong("has a size of 0"));
    }
    if dims.query_heads % dims.key_heads != 0 {
        let Dimensions { query_heads, key_heads, .. } = dims;
        return Err(wrong(&format!("has {query_heads} query heads for {key_heads} key heads")));
    }
    Ok(dims)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_or_seven_sizes_make_a_shape() {
        let dims = parse_shape("1, 2,3,8,4,5").unwrap();
        assert_eq!(dims, dimensions([1, 2, 3, 8, 4, 5, 5]));
        assert_eq!(parse_shape("1,2,3,8,4,5,6").unwrap(), dimensions([1, 2, 3, 8, 4, 5, 6]));
    }

    #[test]
    fn other_text_is_refused_with_what_is_expected() {
        for (text, what) in [
            ("1,2,3", "has 3 sizes"),
            ("1,2,x,8,4,5", "does not consist of numbers"),
            ("1,2,3,8,4,0", "has a size of 0"),
            ("1,2,3,8,3,4", "has 8 query heads for 3 key heads"),
        ] {
            let error = parse_shape(text).unwrap_err();
            assert!(error.contains(what) && error.contains("expected B,T,S,N,K,H"), "{error}");
        }
    }

    #[test]
    fn the_list_has_no_shape_twice_and_decoding_in_it() {
        for (index, shape) in SHAPES.iter().enumerate() {
            assert!(SHAPES[..index].iter().all(|other| other.dims != shape.dims), "{}", shape.dims);
        }
        assert_eq!(SHAPES.iter().filter(|shape| shape.is_decode()).count(), 2);
        assert!(SHAPES.iter().any(|shape| shape.quick));
    }
}
