#include <stdio.h>

#include "settings.h"

int main(void)
{
    puts(APP_NAME " " APP_VERSION " (" APP_PACKAGE ")");
    return 0;
}
