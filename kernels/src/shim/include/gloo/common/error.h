// Stands in for the header of the same name in facebookincubator/gloo, which libtorch was built with but does not
// ship. Declarations only, as few as c10d/ProcessGroupGloo.hpp needs: nothing here is constructed or called by us, so
// nothing depends on the layout of these classes.
#pragma once
