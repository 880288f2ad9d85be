//! An element of a tensor that a kernel works on, or of one that a rule or a codec does not have.

/// Either a number as it is stored, or `()`: a slice of that takes no memory and no time.
pub(crate) trait Slot: Copy + Send + Sync + 'static {
    /// `bytes` as `len` elements.
    ///
    /// # Panics
    /// If they are not as many.
    fn elements(bytes: &[u8], len: usize) -> &[Self];

    /// `bytes` as `len` elements to be written.
    ///
    /// # Panics
    /// If they are not as many.
    fn elements_mut(bytes: &mut [u8], len: usize) -> &mut [Self];

    /// The next of `tensors` as `len` elements; `()` takes none of them.
    ///
    /// # Panics
    /// If there is none, or if it has not as many.
    fn take<'a>(tensors: &mut dyn Iterator<Item = &'a mut [u8]>, len: usize) -> &'a mut [Self];
}

macro_rules! stored {
    ($($number:ty),*) => {$(
        impl Slot for $number {
            fn elements(bytes: &[u8], len: usize) -> &[Self] {
                let elements: &[Self] = bytemuck::cast_slice(bytes);
                assert_eq!(elements.len(), len, "tensors differ in length");
                elements
            }

            fn elements_mut(bytes: &mut [u8], len: usize) -> &mut [Self] {
                let elements: &mut [Self] = bytemuck::cast_slice_mut(bytes);
                assert_eq!(elements.len(), len, "tensors differ in length");
                elements
            }

            fn take<'a>(tensors: &mut dyn Iterator<Item = &'a mut [u8]>, len: usize) -> &'a mut [Self] {
                let bytes = tensors.next().expect("a tensor for everything that the layout lists");
                Self::elements_mut(bytes, len)
            }
        }
    )*};
}
stored!(f32, u16, u8);

impl Slot for () {
    fn elements(_: &[u8], len: usize) -> &[Self] {
        units(len)
    }

    fn elements_mut(_: &mut [u8], len: usize) -> &mut [Self] {
        units(len)
    }

    fn take<'a>(_: &mut dyn Iterator<Item = &'a mut [u8]>, len: usize) -> &'a mut [Self] {
        units(len)
    }
}

/// Elements without a size: nothing is allocated, and so nothing leaks.
fn units(len: usize) -> &'static mut [()] {
    vec![(); len].leak()
}
